"""``data=mil_benchmark``: the protocol, the published folds, and files that are not what they should be."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from kernels.errors import InputError
from tasks.common.cli import main
from tasks.wsi_mil.__main__ import TASK
from tasks.wsi_mil.benchmark import load_benchmark, published_folds

QUICK = ["training.epochs=20", "training.lr=1e-2", "training.batch_size=16", "evaluation.bootstrap=50"]


def write(path: Path, num_bags: int = 40, folds: bool = False) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(num_bags) % 2
    bag = np.repeat(np.arange(num_bags), rng.integers(2, 9, num_bags))
    x = rng.normal(size=(len(bag), 12)).astype("float32") * 40 + 100  # raw scale: useless unless standardised
    first = np.searchsorted(bag, np.arange(num_bags))
    x[first[y == 1], :4] += 200
    np.savez(path, x=x, bag=bag, y=y)
    if folds:
        mask = np.ones((2, 3, num_bags), bool)
        for repeat in range(2):
            for fold, part in enumerate(np.array_split(rng.permutation(num_bags), 3)):
                mask[repeat, fold, part] = False
        np.savez(path.with_name(f"{path.stem}_folds.npz"), train_mask=mask)


def test_published_folds_are_used_and_every_bag_is_tested_once_a_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("toy.npz"), folds=True)
    assert main(TASK, ["data=mil_benchmark", "data.path=toy.npz", "+attention=gated_abmil", "out=run", *QUICK]) == 0
    predictions = pd.read_csv("run/predictions.csv")
    assert (predictions.groupby("repeat")["case_id"].nunique() == 40).all()
    assert len(predictions) == 80
    mask = np.load("toy_folds.npz")["train_mask"]
    for (repeat, fold), part in predictions.groupby(["repeat", "fold"]):
        tested = np.flatnonzero(~mask[repeat, fold - 3 * repeat])
        assert sorted(part["case_id"]) == [f"bag_{i:02d}" for i in tested]
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["folds"]["accuracy"]["n"] == 6
    assert metrics["pooled"]["accuracy"]["low"] > 0.6


def test_without_published_folds_stratified_ones_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("toy.npz"))
    command = ["data=mil_benchmark", "data.path=toy.npz", "crossval.folds=4", "crossval.repeats=2", "out=run", *QUICK]
    assert main(TASK, [*command, "training.epochs=1"]) == 0
    predictions = pd.read_csv("run/predictions.csv", dtype={"label": int})
    assert predictions["fold"].nunique() == 8
    assert (predictions.groupby("fold")["label"].mean() == 0.5).all()


def test_the_scaler_sees_training_instances_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.wsi_mil.checkpoint import load_checkpoint

    monkeypatch.chdir(tmp_path)
    write(Path("toy.npz"), folds=True)
    command = ["data=mil_benchmark", "data.path=toy.npz", "out=run", "crossval.only=[0]", *QUICK, "training.epochs=1"]
    assert main(TASK, command) == 0
    assert [path.name for path in Path("run").glob("fold_*")] == ["fold_00"]
    model, _ = load_checkpoint(Path("run/fold_00/model.safetensors"))
    data = np.load("toy.npz")
    train = np.isin(data["bag"], np.flatnonzero(np.load("toy_folds.npz")["train_mask"][0, 0]))
    np.testing.assert_allclose(model.mean.numpy(), data["x"][train].mean(0), rtol=1e-4)
    np.testing.assert_allclose(1 / model.scale.numpy(), data["x"][train].std(0), rtol=1e-4)


def test_the_protocols_width_gives_way_to_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("toy.npz"), folds=True)
    command = ["data=mil_benchmark", "data.path=toy.npz", "crossval.only=[0]", *QUICK, "training.epochs=1"]
    assert main(TASK, [*command, "+attention=gated_abmil", "attention.dropout=0.1", "out=own"]) == 0
    saved = OmegaConf.load("own/config.yaml")
    assert (saved.attention.hidden_dim, saved.attention.attention_dim, saved.attention.dropout) == (128, 64, 0.1)
    assert main(TASK, ["--config-path", "own", "out=again"]) == 0
    assert Path("own/predictions.csv").read_bytes() == Path("again/predictions.csv").read_bytes()
    assert main(TASK, [*command, "+attention=mean", "out=mean"]) == 0
    assert "attention_dim" not in OmegaConf.load("mean/config.yaml").attention


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"y": None}, "no array 'y'"),
        ({"bag": np.array([0, 1])}, "must be"),
        ({"bag": np.array([0, 1, 9])}, "outside 0 to 1"),
        ({"x": np.full((3, 2), np.nan)}, "NaN"),
        ({"bag": np.array([1, 1, 1])}, "bag 0 has no instances"),
    ],
)
def test_bad_files_are_one_sentence(change: dict[str, np.ndarray | None], sentence: str, tmp_path: Path) -> None:
    arrays = {"x": np.zeros((3, 2)), "bag": np.array([0, 0, 1]), "y": np.array([0, 1]), **change}
    np.savez(tmp_path / "bad.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(InputError, match=sentence):
        load_benchmark(tmp_path / "bad.npz")


def test_a_file_that_is_no_archive_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_text("no archive")
    with pytest.raises(InputError, match="cannot be read as an NPZ file"):
        load_benchmark(tmp_path / "bad.npz")


def test_folds_of_another_data_set_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "toy.npz", folds=True)
    write(tmp_path / "toy.npz", num_bags=20)
    cohort, _ = load_benchmark(tmp_path / "toy.npz")
    with pytest.raises(InputError, match=r"toy_folds\.npz"):
        published_folds(tmp_path / "toy.npz", cohort)


def test_the_classic_sets_are_read(shared_data: Path) -> None:
    for name, bags, instances in (("musk1", 92, 476), ("musk2", 102, 6598), ("elephant", 200, 1391)):
        cohort, _ = load_benchmark(shared_data / "mil" / f"{name}.npz")
        assert len(cohort.cases) == bags
        assert sum(case.num_tiles for case in cohort.cases) == instances
