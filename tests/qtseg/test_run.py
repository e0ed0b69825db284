"""``python -m tasks.qtseg`` as a user runs it, on squares that differ from their surroundings by texture alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from tasks.common.cli import help_text, main
from tasks.common.segmentation.fitting import check_training, recipe_of
from tasks.common.training import History
from tasks.qtseg import fold
from tasks.qtseg.__main__ import TASK, adjust
from tasks.qtseg.data import folds_of, load_images
from tasks.qtseg.demo.baseline import threshold_baseline
from tasks.qtseg.losses import as_common
from tasks.qtseg.model import TASK as NAME
from tests.qtseg.data.files import settings
from tests.qtseg.squares import read_picture, square, write_set

QUICK = [
    "decoder=unet", "decoder.width=4", "decoder.depth=3", "data.img_size=48", "data.augment.policy=light",
    "training.epochs=10", "training.lr=1e-2", "training.batch_size=4", "training.warmup_epochs=1", "crossval.folds=2",
    "evaluation.bootstrap=60", "evaluation.worst=2", "trainer.accelerator=cpu", "inference.device=cpu",
]  # fmt: skip


@pytest.fixture
def squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_set(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*overrides: str, folder: str = "run", data: str = "set/images.csv") -> int:
    return main(TASK, [*QUICK, f"data.path={data}", f"out={folder}", *overrides])


def read(folder: str, name: str = "metrics.json") -> dict[str, Any]:
    return dict(json.loads(Path(folder, name).read_text()))


def baseline() -> float:
    images = load_images(settings(Path("set/images.csv")))
    crossval = {"folds": 2, "repeats": 1, "val_fraction": 0.15, "splits": None, "only": None, "test_fraction": 0.2}
    folds = folds_of(images, OmegaConf.create({"crossval": crossval, "seed": 1}))
    return float(threshold_baseline(images, folds)["dice"])


def test_a_network_beats_the_threshold_and_is_evaluated(squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("inference.probabilities=true") == 0
    metrics = read("run")
    dice = metrics["pooled"]["dice"]
    assert dice["low"] > baseline() + 0.1
    assert dice["low"] <= dice["value"] <= dice["high"]
    assert metrics["protocol"] == "honest" and metrics["classes"] == ["background", "foreground"]
    assert metrics["pixels"]["auc"]["value"] > 0.9 and metrics["cost"]["parameters"] > 1000
    assert {"hd95_px", "nsd_2px", "assd_px", "auc", "sensitivity", "specificity", "accuracy"} <= set(metrics["pooled"])
    assert "Dice" in capsys.readouterr().out
    table = pd.read_csv("run/results.csv")
    assert len(table) == 24 and table["dice"].is_monotonic_increasing
    # Every file has the image's own size, and the mask is what the probabilities say.
    for row in table.head(3).to_dict("records"):
        place = Path("run", row["mask"])
        mask, truth = read_picture(place), read_picture(f"set/masks/{place.name}") > 0
        assert mask.shape == truth.shape
        probability = read_picture(place.parents[1] / "probabilities" / place.name)
        assert probability.dtype == np.uint16 and ((probability >= 32768) == (mask == 255)).mean() > 0.999
        assert row["dice"] == pytest.approx(2 * (truth & (mask > 0)).sum() / (truth.sum() + (mask > 0).sum()))
    report = Path("run/report.html").read_text()
    for part in ("Worst images", "All pixels together", "Empty masks", "data:image/png;base64", "What the network was"):
        assert part in report
    assert "released" not in report.split("Configuration")[0] and "http" not in report
    assert len(list(Path("run/worst").glob("*.png"))) == 2 and Path("run/samples.png").stat().st_size > 5000
    assert not list(Path("run").rglob("*.partial*")) and not list(Path("set").glob("*/*.json"))

    # What a fold's network says of the images it had not seen, once more.
    again = ["action=evaluate", "checkpoint=run/fold_01", "data.path=set/images.csv", "inference.device=cpu"]
    again += ["evaluation.bootstrap=20", "evaluation.worst=1"]
    assert main(TASK, [*again, "evaluation.unseen=true", "out=again"]) == 0
    of_fold, found = read("run/fold_01"), read("again")["pooled"]
    for name in ("dice", "iou", "hd95_px", "auc"):
        assert found[name]["value"] == pytest.approx(of_fold[name], abs=1e-6)
    assert main(TASK, [*again, "out=all"]) == 0
    assert "12 images were used to train" in read("all")["notes"][-1]
    assert main(TASK, [*again, "checkpoint=run", "evaluation.unseen=true", "out=none"]) == 2
    # Other ways to see an image give about the same.
    assert main(TASK, [*again, "checkpoint=run", "inference.flips=all", "inference.smallest=9", "out=flipped"]) == 0
    assert read("flipped")["pooled"]["dice"]["value"] > dice["value"] - 0.05


def test_an_interrupted_run_ends_with_the_bits_of_a_whole_one(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "training.epochs=3", "data.augment.policy=strong", "data.resize=tiles", "data.img_size=32", "training.draws=2",
        "evaluation.worst=0", "+trainer.limit_train_batches=2", "decoder.deep_supervision=true",
        "inference.cutoff=search",
    ]  # fmt: skip
    assert train(*options, folder="whole") == 0
    written = History.on_train_epoch_end

    def stop(self: History, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1 and "fold_01" in str(self.path):
            raise RuntimeError("the plug was pulled")
        written(self, trainer, module)

    with monkeypatch.context() as patch:
        patch.setattr(History, "on_train_epoch_end", stop)
        with pytest.raises(RuntimeError, match="plug"):
            train(*options, folder="cut")
    assert Path("cut/fold_01/resume/last.ckpt").exists()
    first = Path("cut/fold_00/model.safetensors").stat().st_mtime_ns
    torch.manual_seed(123)
    assert train(*options, folder="cut") == 0
    assert Path("cut/fold_00/model.safetensors").stat().st_mtime_ns == first
    names = ("fold_01/history.csv", "fold_01/predictions.csv", "results.csv", "fold_01/model.safetensors")
    for name in names:
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes(), name
    assert 0 < read("cut/fold_01")["cutoff"] < 1
    before = Path("cut/report.html").stat().st_mtime_ns
    assert train(*options, folder="cut") == 0  # finished: nothing is done again
    assert Path("cut/report.html").stat().st_mtime_ns == before


def test_finished_images_are_not_segmented_again(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added = fold.Outcomes.add
    seen: list[str] = []

    def stop_at_the_fifth(self: fold.Outcomes, sample: Any, *rest: Any) -> None:
        if len(seen) == 5:
            raise RuntimeError("the plug was pulled")
        seen.append(sample.case_id)
        added(self, sample, *rest)

    quick = ["training.epochs=1", "crossval.only=[0]", "evaluation.worst=0"]
    with monkeypatch.context() as patch:
        patch.setattr(fold.Outcomes, "add", stop_at_the_fifth)
        with pytest.raises(RuntimeError, match="plug"):
            train(*quick)
    done = {path.name: path.stat().st_mtime_ns for path in Path("run/fold_00/masks").glob("*.png")}
    assert len(done) == 5 and not Path("run/fold_00/metrics.json").exists()
    assert train(*quick) == 0
    after = {path.name: path.stat().st_mtime_ns for path in Path("run/fold_00/masks").glob("*.png")}
    assert len(after) == 12 and all(after[name] == time for name, time in done.items())


def test_the_released_protocol_is_labelled_wherever_it_shows(squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["protocol=released", "training.epochs=2", "training.loss=qtseg", "crossval.only=[0]"]
    assert train(*options) == 0
    assert "RELEASED PROTOCOL" in capsys.readouterr().out
    metrics = read("run")
    assert metrics["protocol"] == "released" and "too good" in metrics["notes"][0]
    assert "counted at the network's size" in metrics["notes"][1]
    assert set(metrics["pooled"]) == {"dice", "iou", "accuracy", "mae"} and "auc" not in metrics["pixels"]
    assert metrics["pooled"]["mae"]["value"] == pytest.approx(1 - metrics["pooled"]["accuracy"]["value"])
    report = Path("run/report.html").read_text()
    assert "(released protocol)" in report and "the epoch was chosen on the very images" in report
    assert (pd.read_csv("run/results.csv")["protocol"] == "released").all()
    # At the network's size, its padding with it, every pixel counts.
    row = pd.read_csv("run/fold_00/predictions.csv").iloc[0]
    assert row[["tp", "fp", "fn", "tn"]].sum() == 48 * 48
    history = pd.read_csv("run/fold_00/history.csv")
    assert len(history) == 2 and "val_dice" in history
    new = ["action=predict", "checkpoint=run", "input=set/images/case_00.png", "out=new", "inference.device=cpu"]
    assert main(TASK, new) == 0
    assert "the epoch was chosen on the very images" in Path("new/report.html").read_text()


def test_a_second_reader_is_scored_by_the_same_rules(squares: Path) -> None:
    children = Path("chase")
    children.mkdir()
    for number in (1, 2, 3, 11, 12):
        for side in "LR":
            image, mask = square(number, (40, 40))
            Image.fromarray(image).save(children / f"Image_{number:02d}{side}.jpg")
            Image.fromarray(mask).save(children / f"Image_{number:02d}{side}_1stHO.png")
            Image.fromarray(np.roll(mask, 2, 0)).save(children / f"Image_{number:02d}{side}_2ndHO.png")
    assert train("data.preset=chase", "training.epochs=1", data="chase") == 0
    second, own = read("run")["second_reader"], read("run")
    assert second["cases"] == own["cases"] == 4 and own["patients"] == 2
    assert 0.7 < second["pooled"]["dice"]["value"] < 1 and "auc" not in second["pooled"]
    assert "cldice" in second["pooled"] and "Second reader" in Path("run/report.html").read_text()


def test_fields_of_view_vessels_and_empty_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "set", count=12, empty=2, fov=True)
    options = ["data.labels={vessel: 255}", "training.epochs=1", "evaluation.worst=1", "crossval.folds=2"]
    assert train(*options, "crossval.val_fraction=0", "training.loss=qtseg") == 0
    metrics = read("run")
    assert "cldice" in metrics["pooled"] and "inside the field of view" in metrics["definitions"][0]
    assert any("an empty mask" in note for note in metrics["notes"])
    row = pd.read_csv("run/results.csv", index_col="case_id").loc["case_03"]
    assert row[["tp", "fp", "fn", "tn"]].sum() == 40 * (52 - 6)
    assert train(*options, "evaluation.empty=one", "evaluation.vessels=false", folder="one") == 0
    assert "cldice" not in read("one")["pooled"]
    assert "1 where neither mask has a pixel" in " ".join(read("one")["definitions"])


def test_several_classes_have_their_own_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "set", count=12)
    for index, path in enumerate(sorted(Path("set/masks").glob("*.png"))):
        mask = (read_picture(path) > 0).astype(np.uint8) * (1 + index % 2)
        Image.fromarray(mask).save(path)
    labels = "data.labels={benign: 1, malignant: 2}"
    assert train(labels, "training.epochs=2", "training.loss=qtseg", "inference.probabilities=true") == 0
    assert {"dice/benign", "iou/malignant"} <= set(read("run")["pooled"])
    with Image.open(next(Path("run/fold_00/masks").glob("*.png"))) as mask:
        assert mask.mode == "P" and set(np.unique(np.asarray(mask))) <= {0, 1, 2}
    assert len(list(Path("run/fold_00/probabilities").glob("case_*_1_benign.png"))) == 6
    assert main(TASK, ["action=evaluate", "checkpoint=run", "data.path=set/images.csv", "out=no"]) == 2


def test_a_pretrained_encoder_learns_once_it_is_no_longer_frozen(squares: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    save_file(state, "weights.safetensors")
    begin = ["backbone=test_resnet", "backbone.checkpoint=weights.safetensors", "training.select=last"]
    quick = ["training.epochs=2", "+trainer.limit_train_batches=2", "crossval.only=[0]", "evaluation.worst=0"]
    plain = [o for o in QUICK if "depth" not in o]
    for name, frozen in (("always", 2), ("at_first", 1)):
        options = [*plain, *begin, *quick, f"training.freeze_epochs={frozen}", f"out={name}"]
        assert main(TASK, [*options, "data.path=set/images.csv"]) == 0
        kept = load_file(f"{name}/fold_00/model.safetensors")
        key = next(key for key in kept if key.endswith("layer1.0.conv1.weight"))
        original = next(value for own, value in state.items() if key.endswith(own))
        assert torch.equal(kept[key], original) == (frozen == 2)
        # Its statistics go on following the images.
        mean = next(key for key in kept if key.startswith("encoder") and key.endswith("bn1.running_mean"))
        assert not torch.equal(kept[mean], next(value for own, value in state.items() if mean.endswith(own)))


def test_a_sweep_compares_networks(squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = ["-m", "decoder.width=2,4", "training.epochs=1", "crossval.folds=1", "evaluation.worst=0"]
    assert main(TASK, [*[o for o in QUICK if "width" not in o], *jobs, "data.path=set/images.csv", "out=sweep"]) == 0
    table = pd.read_csv("sweep/comparison.csv")
    assert list(table["job"].str.extract(r"width=(\d)")[0]) == ["2", "4"]
    assert table["parameters"].nunique() == 2 and table["dice"].between(0, 1).all()
    assert "comparison" in capsys.readouterr().out


def test_the_demo_is_the_default_and_prints_its_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = [f"data.shapes2d.folder={tmp_path / 'demo'}", "data.shapes2d.images=16", "data.shapes2d.side=48"]
    quick = [
        "training.epochs=1",
        "crossval.folds=2",
        "data.img_size=48",
        "evaluation.bootstrap=20",
        "evaluation.worst=1",
    ]
    assert main(TASK, [*demo, *quick, f"out={tmp_path / 'run'}", "data.shapes2d.kind=vessels"]) == 0
    assert "Dice of thresholding" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["classes"][1] == "vessel" and "cldice" in metrics["pooled"]
    assert "thresh" in (tmp_path / "run" / "report.html").read_text()


def test_the_command_line_knows_its_data() -> None:
    assert NAME == "qtseg"
    assert adjust([]) == ["data=shapes2d", "recipe=demo", "decoder.width=8", "decoder.mlp_dim=256"]
    assert adjust(["decoder=unet"]) == ["decoder=unet", "data=shapes2d", "recipe=demo"]
    assert adjust(["data=shapes2d", "recipe=isic", "decoder.width=4"])[3:] == ["decoder.mlp_dim=256"]
    assert adjust(["data=/some/folder", "decoder=unet"]) == ["data.path=/some/folder", "decoder=unet"]
    assert adjust(["action=predict"]) == ["action=predict"]
    text = help_text(TASK)
    assert "data: segmentation2d, shapes2d" in text and "mil_benchmark" not in text and "released" in text


@pytest.mark.parametrize("recipe", ["scratch", "isic", "fives", "vessels", "demo"])
def test_every_recipe_can_be_followed(recipe: str) -> None:
    with initialize_config_module(config_module="conf", version_base="1.3"):
        cfg = compose("qtseg", overrides=[f"recipe={recipe}"])
    check_training(cfg, 2, {"qtseg": as_common()})
    rate = recipe_of(cfg.training)
    found = [rate.rate(epoch) for epoch in (0, 49, 50, 349)]
    if recipe in ("isic", "fives"):
        assert rate.epochs == 350 and cfg.training.freeze_epochs == 49 and cfg.training.loss == "qtseg"
    if recipe == "isic":
        assert rate.optimizer == "adamw" and found == pytest.approx([1e-3, 1e-3, 5e-4, 1e-3 / 2**6])
        assert cfg.data.colour == "ycrcb" and cfg.training.weight_decay == 3e-5
    if recipe == "fives":
        assert rate.optimizer == "sgd" and rate.momentum == 0.99 and cfg.data.img_size == 1024
        assert found[:2] == pytest.approx([1e-2, 1e-2 * (1 - 49 / 350) ** 0.9])
