"""From a checkpoint and slides, or features made before, to probabilities and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from backbones import create_encoder
from kernels.errors import InputError
from tasks.common.checkpoints import FILE_NAME
from tasks.wsi_mil import predict
from tasks.wsi_mil.checkpoint import Description, load_classifier, save_checkpoint
from tasks.wsi_mil.extract import weights_fingerprint
from tasks.wsi_mil.features import find_bags, read_features, write_bag
from tasks.wsi_mil.predict_inputs import find_inputs
from tasks.wsi_mil.rebuild import prepare_options, rebuild_encoder
from tasks.wsi_mil.slide_outputs import MapSettings, attention_rows, automatic_downsample
from tasks.wsi_mil.targets import Target
from tests.wsi_mil.tiny_slide import write_slide

ROOT = Path(__file__).parents[2]
ENCODER = "resnet10t"
TILES = {"mpp": 0.5, "tile": 112, "overlap": 0}


@pytest.fixture(scope="module")
def encoder() -> dict[str, Any]:
    """What a checkpoint says of the encoder."""
    torch.manual_seed(0)
    made = create_encoder(ENCODER, seed=3)
    return {"name": ENCODER, "weights": made.weights, "fingerprint": weights_fingerprint(made), "dim": made.dim}


def make_run(
    folder: Path, dim: int, *, folds: int = 2, attention: str = "acmil", target: Target | None = None, **about: Any
) -> Path:
    """A run folder of untrained models."""
    for fold in range(folds):
        torch.manual_seed(fold)
        target = target or Target("binary", ("normal", "tumour"))
        description = Description(dim, {"name": attention}, target, tiles=TILES, **about)
        save_checkpoint(folder / f"fold_{fold}" / FILE_NAME, description.build(), description)
    return folder


def configuration(run: Path, given: Any, folder: Path, /, **changes: Any) -> DictConfig:
    base = {
        "task": "wsi_mil",
        "action": "predict",
        "checkpoint": str(run),
        "input": [str(path) for path in given] if isinstance(given, list) else str(given),
        "out": str(folder),
        "resume": True,
        "dry_run": False,
        "data": {"slides": None, "workers": 0, "batch_size": 32},
        "backbone": {"name": "resnet18", "pretrained": False, "checkpoint": None, "params": {}},
        "inference": {"device": "cpu"},
        "predict": OmegaConf.load(ROOT / "conf" / "predict" / "default.yaml"),
    }
    cfg = OmegaConf.merge(OmegaConf.create(base), OmegaConf.from_dotlist([f"{k}={v}" for k, v in changes.items()]))
    assert isinstance(cfg, DictConfig)
    return cfg


def make_bag(path: Path, count: int = 12, dim: int = 16, seed: int = 0, **attributes: Any) -> Path:
    rng = np.random.default_rng(seed)
    xy = np.stack([np.arange(count) % 4, np.arange(count) // 4], 1) * 112
    write_bag(
        path, rng.normal(size=(count, dim)).astype(np.float32), xy, attributes={"patch_size_level0": 112, **attributes}
    )
    return path


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "007.tiff")
    write_slide(folder / "nested" / "b.tiff", 1201, 905, seed=1)
    return folder


@pytest.fixture(scope="module")
def predicted(
    slides: Path, encoder: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, DictConfig]:
    """Both slides predicted with two models."""
    root = tmp_path_factory.mktemp("predicted")
    run = make_run(root / "run", encoder["dim"], encoder=encoder)
    cfg = configuration(run, slides, root / "out", **{"predict.top_k": 4})
    predict.run(cfg, root / "out")
    return root / "out", cfg


def test_every_file_of_a_slide_is_there_and_opens(predicted: tuple[Path, DictConfig]) -> None:
    folder = predicted[0] / "007"
    assert {path.name for path in folder.iterdir()} == {
        "heatmap.png", "overlay.png", "overlay.tiff", "tiles.geojson", "top_tiles.png", "scores.csv", "scores.h5",
        "prediction.json",
    }  # fmt: skip
    with Image.open(folder / "overlay.png") as overlay, Image.open(folder / "heatmap.png") as picture:
        assert overlay.size == (1500, 1100) and picture.size[0] > 500
    with openslide.OpenSlide(folder / "overlay.tiff") as pyramid:
        assert pyramid.dimensions == (1500, 1100)
        assert float(pyramid.properties["openslide.mpp-x"]) == pytest.approx(0.5)
    table = pd.read_csv(folder / "scores.csv")
    features = json.loads((folder / "tiles.geojson").read_text())["features"]
    with h5py.File(folder / "scores.h5") as scores:
        assert len(features) == len(table) == len(scores["attention"])
        np.testing.assert_allclose(scores["attention"][:].sum(), 1, rtol=1e-5)
        np.testing.assert_array_equal(scores["coords"][:], table[["x", "y"]])
    corner = features[3]["geometry"]["coordinates"][0][0]
    assert corner == table.loc[3, ["x", "y"]].tolist()
    assert features[3]["properties"]["measurements"]["Attention"] == pytest.approx(table.loc[3, "attention"], rel=1e-5)


def test_the_table_gives_the_mean_over_models_and_their_spread(predicted: tuple[Path, DictConfig]) -> None:
    out, cfg = predicted
    table = pd.read_csv(out / "predictions.csv", dtype={"slide_id": str})
    assert table["slide_id"].tolist() == ["007", "b"], "ids stay text and in order"
    bag = find_bags(out / "prepared" / "features")["007"]
    outcome = load_classifier(Path(cfg.checkpoint)).predict(torch.from_numpy(read_features(bag)))
    row = table.iloc[0]
    expected = outcome.model_probabilities.numpy()
    np.testing.assert_allclose(row[["p_normal", "p_tumour"]].to_numpy(float), expected.mean(0), rtol=1e-5)
    np.testing.assert_allclose(row[["sd_normal", "sd_tumour"]].to_numpy(float), expected.std(0), rtol=1e-4, atol=1e-7)
    assert row["predicted"] == ("normal", "tumour")[int(expected.mean(0).argmax())]
    assert row["tiles"] == bag.num_tiles > 20


def test_tiles_are_cut_as_in_training(predicted: tuple[Path, DictConfig]) -> None:
    with h5py.File(predicted[0] / "prepared" / "features" / "b.h5") as file:
        assert file["coords"].attrs["patch_size"] == 112
        assert file["coords"].attrs["requested_mpp"] == 0.5


def test_a_second_run_does_nothing_again_and_a_lost_file_is_made_again(predicted: tuple[Path, DictConfig]) -> None:
    out, cfg = predicted
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.parent.name in ("007", "b")}
    (out / "b" / "overlay.png").unlink()
    rows = predict.run(cfg, out)
    assert [row["slide_id"] for row in rows] == ["007", "b"]
    after = {path: path.stat().st_mtime_ns for path in before}
    unchanged = {path.parent.name for path in before if before[path] == after[path]}
    assert unchanged == {"007"}


def test_a_slide_added_to_the_folder_later_is_predicted_by_the_same_command(
    slides: Path, encoder: dict[str, Any], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", encoder["dim"], folds=1, encoder=encoder)
    inputs = tmp_path / "in"
    make_bag(inputs / "a.h5", dim=encoder["dim"])
    cfg = configuration(run, inputs, tmp_path / "out")
    assert [row["slide_id"] for row in predict.run(cfg, tmp_path / "out")] == ["a"]
    make_bag(inputs / "b.h5", dim=encoder["dim"], seed=1)
    assert [row["slide_id"] for row in predict.run(cfg, tmp_path / "out")] == ["a", "b"]


def test_a_bad_slide_is_reported_in_one_sentence_and_the_others_are_done(
    slides: Path, encoder: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", encoder["dim"], folds=1, encoder=encoder)
    broken, unknown = tmp_path / "broken.svs", tmp_path / "unknown.tiff"
    broken.write_bytes(b"II*\0" + bytes(500))
    write_slide(unknown, mpp=None)
    cfg = configuration(run, [slides / "007.tiff", broken, unknown], tmp_path / "out", **{"predict.pyramid": "null"})
    with pytest.raises(InputError, match=r"^2 of 3 failed: .*; all reasons are in .*failures\.csv\.$"):
        predict.run(cfg, tmp_path / "out")
    assert pd.read_csv(tmp_path / "out" / "predictions.csv", dtype=str)["slide_id"].tolist() == ["007"]
    reasons = pd.read_csv(tmp_path / "out" / "failures.csv").set_index("slide_id")["reason"]
    assert sorted(reasons.index) == ["broken", "unknown"] and "micrometres" in reasons["unknown"]
    shown = capsys.readouterr().out
    assert "007" in shown and "failed" in shown


def test_one_models_branches_get_maps_and_several_models_do_not(
    slides: Path, encoder: dict[str, Any], tmp_path: Path
) -> None:
    several = load_classifier(make_run(tmp_path / "two", 16, folds=2))
    single = load_classifier(make_run(tmp_path / "one", 16, folds=1))
    per_class = load_classifier(make_run(tmp_path / "clam", 16, folds=2, attention="clam_mb"))
    features = torch.randn(9, 16)
    assert attention_rows(several, several.predict(features)) == {}
    assert list(attention_rows(single, single.predict(features))) == [f"branch {i}" for i in range(1, 6)]
    assert list(attention_rows(per_class, per_class.predict(features))) == ["normal", "tumour"]


def test_features_alone_give_probabilities_scores_and_geojson(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 16, folds=1)
    make_bag(tmp_path / "features" / "s1.h5")
    torch.save(torch.randn(5, 16), tmp_path / "features" / "s2.pt")
    rows = predict.run(configuration(run, tmp_path / "features", tmp_path / "out"), tmp_path / "out")
    assert [(row["slide_id"], row["tiles"]) for row in rows] == [("s1", 12), ("s2", 5)]
    names = {path.name for path in (tmp_path / "out" / "s1").iterdir()}
    assert names == {"scores.csv", "scores.h5", "tiles.geojson", "prediction.json"}
    assert {path.name for path in (tmp_path / "out" / "s2").iterdir()} == {"scores.csv", "prediction.json"}
    assert pd.read_csv(tmp_path / "out" / "predictions.csv")["sd_tumour"].isna().all(), "one model has no spread"


def test_features_with_their_slide_give_maps_without_an_encoder(slides: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 16, folds=1)
    bag = make_bag(tmp_path / "007.h5")
    cfg = configuration(run, bag, tmp_path / "out", **{"data.slides": slides, "predict.pyramid": "null"})
    predict.run(cfg, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out" / "007").iterdir()}
    assert {"heatmap.png", "branches.png", "overlay.png", "top_tiles.png"} <= names and "overlay.tiff" not in names


def test_multilabel_predictions_list_every_label_above_a_half(tmp_path: Path) -> None:
    target = Target("multilabel", ("er", "pr", "her2"))
    classifier = load_classifier(make_run(tmp_path / "run", 16, folds=1, target=target))
    outcome = classifier.predict(torch.randn(9, 16))
    row = predict.result_row("s", outcome, classifier)
    expected = [c for c, p in zip(target.classes, outcome.probabilities.tolist(), strict=True) if p > 0.5]
    assert row["predicted"] == (";".join(expected) or "none")
    assert predict.headline(row, classifier).count(",") == 2


def test_features_of_another_encoder_size_or_weights_are_refused(tmp_path: Path) -> None:
    about = {"name": "uni", "fingerprint": "aaaa"}
    classifier = load_classifier(make_run(tmp_path / "run", 16, folds=1, encoder=about))
    cases = {
        r"have 8 values per tile and the model was trained on 16; .*\('uni'\)": {"dim": 8},
        "made with encoder 'virchow2' and the model was trained with encoder 'uni'": {"encoder": "virchow2"},
        "made with weights 'bbbb' and the model was trained with weights 'aaaa'": {"weights_fingerprint": "bbbb"},
    }
    for number, (sentence, attributes) in enumerate(cases.items()):
        path = make_bag(tmp_path / f"{number}.h5", **attributes)
        with pytest.raises(InputError, match=sentence):
            predict.check_made_by(find_bags(path)[str(number)], classifier)
    fitting = make_bag(tmp_path / "fit.h5", encoder="uni", weights_fingerprint="aaaa")
    predict.check_made_by(find_bags(fitting)["fit"], classifier)


def test_features_of_another_slide_are_refused(slides: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 16, folds=1)
    count = 200  # rows down to y = 5600, far below the slide
    cfg = configuration(run, make_bag(tmp_path / "007.h5", count), tmp_path / "out", **{"data.slides": slides})
    with pytest.raises(InputError, match=r"outside the 1500 x 1100 pixels of .*007\.tiff"):
        predict.run(cfg, tmp_path / "out")


def test_an_encoder_whose_weights_changed_is_refused(encoder: dict[str, Any]) -> None:
    backbone = OmegaConf.create({"name": "resnet18", "checkpoint": None})
    rebuilt = rebuild_encoder(encoder, backbone)
    assert weights_fingerprint(rebuilt) == encoder["fingerprint"], "the seed is read from the weights line"
    with pytest.raises(InputError, match=f"encoder '{ENCODER}' has other weights"):
        rebuild_encoder({**encoder, "weights": "random, seed 4"}, backbone)
    with pytest.raises(InputError, match="does not say which encoder"):
        rebuild_encoder({}, backbone)
    with pytest.raises(InputError, match=r"weights uni\.bin \(sha256 0f\).*backbone\.checkpoint=FILE"):
        rebuild_encoder({**encoder, "weights": "uni.bin (sha256 0f)"}, backbone)
    with pytest.raises(InputError, match="does not say which weights; say where the weights are"):
        rebuild_encoder({"name": ENCODER, "weights": "unknown"}, backbone)


def test_weights_are_looked_for_where_the_user_says(encoder: dict[str, Any], tmp_path: Path) -> None:
    made = create_encoder(ENCODER, seed=9)
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in made.model.state_dict().items()}, tmp_path / "w.safetensors")
    trained_with = create_encoder(ENCODER, checkpoint=tmp_path / "w.safetensors")
    about = {"name": ENCODER, "weights": "w.safetensors (sha256 00)", "fingerprint": weights_fingerprint(trained_with)}
    backbone = OmegaConf.create({"name": "resnet18", "checkpoint": str(tmp_path / "w.safetensors")})
    assert weights_fingerprint(rebuild_encoder(about, backbone)) == about["fingerprint"]


def test_tiles_of_new_slides_are_asked_for_as_in_training() -> None:
    data = {"mpp": 2.0, "tile": 64, "overlap": 9, "min_tissue": 0.4, "workers": 3}
    options = prepare_options(TILES, OmegaConf.create({"data": data}))
    assert (options.mpp, options.tile, options.overlap, options.min_tissue, options.workers) == (0.5, 112, 0, 0.4, 3)
    assert prepare_options({}, OmegaConf.create({"data": data})).mpp == 2.0
    # What was asked for counts, not what one slide made of it.
    settings = {"min_tissue": 0.25, "tissue": {"preset": "biopsy"}}
    trained = {**TILES, "min_tissue": 0.01, "settings": settings}
    options = prepare_options(trained, OmegaConf.create({"data": data}))
    assert (options.min_tissue, options.tissue.preset) == (0.25, "biopsy")
    own = prepare_options(trained, OmegaConf.create({"data": {**data, "tissue": {"reject_pen": True}}}))
    assert (own.tissue.preset, own.tissue.reject_pen) == ("auto", True)


def test_inputs_are_slides_features_folders_and_lists_of_them(slides: Path, tmp_path: Path) -> None:
    assert [item.slide_id for item in find_inputs(slides)] == ["007", "b"]
    make_bag(tmp_path / "b.h5")
    both = find_inputs([slides / "nested" / "b.tiff", tmp_path / "b.h5", slides / "007.tiff"])
    assert [(item.slide_id, item.slide is not None, item.bag is not None) for item in both] == [
        ("007", True, False),
        ("b", True, True),
    ]
    assert find_inputs(tmp_path / "b.h5", slides)[0].slide == slides / "nested" / "b.tiff"


def test_inputs_that_cannot_be_meant_are_refused(slides: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs input=PATH"):
        find_inputs(None)
    with pytest.raises(InputError, match=r"input=.*missing\.svs does not exist"):
        find_inputs(tmp_path / "missing.svs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no slide and no features"):
        find_inputs(tmp_path / "empty")
    write_slide(tmp_path / "twin" / "007.tiff", 300, 300)
    with pytest.raises(InputError, match="'007' stands for two files"):
        find_inputs([slides, tmp_path / "twin"])


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("predict.mode=ranks", r"predict\.mode 'ranks' is not known. Did you mean 'rank'"),
        ("predict.colormap=virdis", r"predict\.colormap 'virdis' is not known. Did you mean 'viridis'"),
        ("predict.alpha=2", r"predict\.alpha=2 must lie between 0"),
        ("predict.downsample=0.5", r"predict\.downsample=0\.5 must be auto or at least 1"),
        ("predict.pyramid=big", r"predict\.pyramid=big must be auto or at least 1"),
        ("predict.top_k=-1", r"predict\.top_k=-1 must be a number of tiles"),
        ("checkpoint=null", r"needs checkpoint=RUN"),
        ("checkpoint=nowhere", r"checkpoint=nowhere does not exist"),
        ("input=null", r"needs input=PATH"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(tmp_path: Path, option: str, sentence: str) -> None:
    run = make_run(tmp_path / "run", 16, folds=1)
    key, _, value = option.partition("=")
    cfg = configuration(run, make_bag(tmp_path / "a.h5"), tmp_path / "out", **{key: value})
    with pytest.raises(InputError, match=sentence):
        predict.run(cfg, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 16, folds=1)
    cfg = configuration(run, make_bag(tmp_path / "a.h5"), tmp_path / "out", dry_run=True)
    assert predict.run(cfg, tmp_path / "out") == []
    assert not (tmp_path / "out").exists()


def test_automatic_downsamples_are_powers_of_two_that_fit() -> None:
    assert automatic_downsample((4096, 100), 4096) == 1
    assert automatic_downsample((4097, 100), 4096) == 2
    assert automatic_downsample((100, 150_000), 16384) == 16


def test_settings_come_from_the_shipped_file() -> None:
    settings = MapSettings.from_config(OmegaConf.load(ROOT / "conf" / "predict" / "default.yaml"))
    assert (settings.mode, settings.downsample, settings.pyramid, settings.geojson) == ("rank", None, None, True)
