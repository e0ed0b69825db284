"""``action=train`` and ``action=evaluate`` as a user runs them, on feature files with a signal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from tasks.common.cli import main
from tasks.wsi_mil.__main__ import TASK
from tasks.wsi_mil.checkpoint import load_classifier
from tests.wsi_mil.bags import DIM, write_cohort

ROOT = Path(__file__).parents[2]
QUICK = [
    "training.epochs=25",
    "training.lr=1e-2",
    "training.batch_size=4",
    "crossval.folds=3",
    "evaluation.bootstrap=100",
]


@pytest.fixture
def cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_cohort(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*overrides: str, folder: str = "run") -> int:
    data = ["data.features=features", "data.labels=labels.csv"]
    return main(TASK, [*QUICK, *data, f"out={folder}", "evaluation.heatmaps=1", *overrides])


def test_acmil_beats_chance_and_leaves_everything_a_reader_needs(cohort: Path) -> None:
    assert train() == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["attention"] == "acmil"
    assert metrics["pooled"]["auc"]["low"] > 0.6
    assert metrics["pooled"]["auc"]["low"] <= metrics["pooled"]["auc"]["value"] <= metrics["pooled"]["auc"]["high"]
    assert metrics["folds"]["auc"]["n"] == 3
    assert metrics["by_patient"]["auc"] > 0.6
    predictions = pd.read_csv("run/predictions.csv", dtype={"case_id": str})
    assert sorted(predictions["case_id"]) == [f"{i:03d}" for i in range(24)]
    report = Path("run/report.html").read_text()
    assert "data:image/png;base64" in report
    assert "http" not in report.replace("http://www.w3.org", "")
    for name in ("roc", "precision_recall", "confusion_matrix", "learning_curves", "calibration"):
        assert Path(f"run/plots/{name}.png").stat().st_size > 5000
    assert list(Path("run/heatmaps").glob("*.png"))
    assert not list(Path("run").rglob("*.partial*"))


def test_no_patient_is_on_two_sides_of_a_fold(cohort: Path) -> None:
    assert train("training.epochs=1") == 0
    patient = dict(pd.read_csv("labels.csv", dtype=str)[["slide_id", "patient"]].itertuples(index=False))
    paths = sorted(Path("run/splits").glob("splits_[0-9].csv"))
    assert len(paths) == 3
    for path in paths:
        table = pd.read_csv(path, dtype=str)
        sides = [{patient[i] for i in table[side].dropna()} for side in ("train", "val", "test")]
        assert all(sides)
        assert not (sides[0] & sides[2] or sides[0] & sides[1] or sides[1] & sides[2])


def test_the_same_configuration_gives_the_same_bits(cohort: Path) -> None:
    assert train("training.epochs=3", folder="first") == 0
    assert main(TASK, ["--config-path", "first", "out=second"]) == 0
    assert Path("first/predictions.csv").read_bytes() == Path("second/predictions.csv").read_bytes()
    for one, other in zip(load_classifier(Path("first")).models, load_classifier(Path("second")).models, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        )


def test_a_run_killed_in_the_middle_goes_on_and_ends_with_the_same_bits(cohort: Path) -> None:
    command = [
        sys.executable, "-m", "tasks.wsi_mil", *QUICK, "training.epochs=40", "data.features=features",
        "data.labels=labels.csv", "evaluation.heatmaps=0",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        history = list(Path("outputs").rglob("fold_01/history.csv"))
        if history and len(history[0].read_text().splitlines()) > 5:
            break
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = Path("outputs/wsi_mil").iterdir()
    first_fold = (folder / "fold_00" / "model.safetensors").stat().st_mtime_ns
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "going on with the unfinished run" in done.stderr
    assert list(Path("outputs/wsi_mil").iterdir()) == [folder]
    assert (folder / "fold_00" / "model.safetensors").stat().st_mtime_ns == first_fold
    subprocess.run([*command, "out=whole", "resume=false"], env=environment, check=True, capture_output=True)
    for fold in ("fold_00", "fold_01", "fold_02"):
        for name in ("predictions.csv", "history.csv"):
            assert (folder / fold / name).read_bytes() == Path("whole", fold, name).read_bytes(), (fold, name)


def test_ctrl_c_ends_with_a_sentence_and_keeps_the_last_epoch(cohort: Path) -> None:
    command = [sys.executable, "-m", "tasks.wsi_mil", "training.epochs=500", "data.features=features"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "data.labels=labels.csv"], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(Path("outputs").rglob("fold_00/resume/last.ckpt")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert error.strip().endswith("the same command goes on from there.")
    assert "Traceback" not in error
    assert list(Path("outputs").rglob("fold_00/resume/last.ckpt"))


def test_nothing_is_written_when_the_model_cannot_be_built(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("+attention=acmil", "+attention.num_brnches=3", folder="never") == 2
    assert "Did you mean 'num_branches'?" in capsys.readouterr().err
    assert not Path("never").exists()


def test_a_finished_run_is_not_repeated(cohort: Path) -> None:
    assert train("training.epochs=1") == 0
    before = Path("run/report.html").stat().st_mtime_ns
    assert train("training.epochs=1") == 0
    assert Path("run/report.html").stat().st_mtime_ns == before


def test_another_configuration_in_the_same_folder_is_refused(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("training.epochs=1") == 0
    assert train("training.epochs=2") == 2
    assert "another configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["mean", "max", "abmil", "gated_abmil", "acmil_mha", "clam_sb", "clam_mb", "dsmil", "transmil"]
)
def test_every_pooler_trains(name: str, cohort: Path) -> None:
    hidden = ["attention.hidden_dim=16"] if name in ("acmil_mha", "transmil") else []
    assert train(f"+attention={name}", *hidden, "training.epochs=2", "crossval.only=[0]", "evaluation.heatmaps=1") == 0
    assert json.loads(Path("run/metrics.json").read_text())["attention"] == name


@pytest.mark.parametrize("kind", ["multiclass", "ordinal", "multilabel"])
def test_other_kinds_of_target_train_and_report(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cohort(tmp_path, 36, classes=3)
    monkeypatch.chdir(tmp_path)
    overrides = [f"data.target={kind}"]
    if kind == "multilabel":
        table = pd.read_csv("labels.csv", dtype=str)
        table["one"], table["two"] = (table["label"] == "grade1").astype(int), (table["label"] == "grade2").astype(int)
        table.drop(columns="label").to_csv("labels.csv", index=False)
        overrides = ["data.label_column=[one,two]"]
    if kind == "ordinal":
        overrides.append("data.classes=[normal,grade1,grade2]")
    assert train(*overrides, "training.class_weights=balanced", "training.sampling=weighted") == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["target"] == kind
    assert metrics["pooled"]["auc"]["value"] > 0.6


def test_the_users_own_split_is_used_and_a_leaking_one_refused(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [f"{i:03d}" for i in range(24)]
    Path("split.json").write_text(
        json.dumps({"train_names": ids[:16], "val_names": ids[16:20], "test_names": ids[20:]})
    )
    assert train("crossval.splits=split.json", "training.epochs=1") == 0
    assert sorted(pd.read_csv("run/predictions.csv", dtype=str)["case_id"]) == ids[20:]
    Path("leak.json").write_text(
        json.dumps({"train_names": ids[:15], "val_names": ids[16:20], "test_names": ["015", "023"]})
    )
    assert train("crossval.splits=leak.json", folder="other") == 2
    assert "patient 'p7'" in capsys.readouterr().err


def test_early_stopping_keeps_the_best_epoch(cohort: Path) -> None:
    assert train("training.select=val_loss", "training.patience=2", "training.epochs=60", "training.lr=2e-2") == 0
    for fold in range(3):
        history = pd.read_csv(f"run/fold_0{fold}/history.csv")
        epoch = json.loads(Path(f"run/fold_0{fold}/metrics.json").read_text())["epoch"]
        assert epoch == history["epoch"][history["val_loss"].idxmin()]
        assert len(history) <= epoch + 2


def test_averaged_weights_are_kept_when_asked(cohort: Path) -> None:
    overrides = ("crossval.val_fraction=0", "training.select=last", "training.epochs=4", "crossval.only=[0]")
    assert train(*overrides, "training.average_from=0.5", folder="averaged") == 0
    assert train(*overrides, folder="last") == 0
    averaged, last = (load_classifier(Path(f)).models[0].state_dict() for f in ("averaged", "last"))
    assert any(not torch.equal(averaged[k], last[k]) for k in last)


def test_a_sweep_compares_its_jobs(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["data.features=features", "data.labels=labels.csv", "training.epochs=1", "crossval.folds=3"]
    assert main(TASK, ["-m", "+attention=mean,max", *data, "out=sweep", "evaluation.heatmaps=0"]) == 0
    table = pd.read_csv("sweep/comparison.csv")
    assert list(table["job"].str.extract(r"attention=(\w+)")[0]) == ["mean", "max"]
    assert "comparison" in capsys.readouterr().out


def test_a_sweep_that_was_cut_short_does_not_repeat_its_finished_jobs(cohort: Path) -> None:
    data = ["data.features=features", "data.labels=labels.csv", "training.epochs=1", "evaluation.heatmaps=0"]
    command = ["-m", "+attention=mean,max", *data, "crossval.folds=3"]
    assert main(TASK, command) == 0
    (sweep,) = Path("outputs/wsi_mil").iterdir()
    finished = (sweep / "0" / "report.html").stat().st_mtime_ns
    # As a kill in the second job leaves it: no comparison yet, one fold of the second job missing.
    (sweep / "comparison.csv").unlink()
    (sweep / "1" / "fold_02" / "metrics.json").unlink()
    record = json.loads((sweep / "1" / "run.json").read_text())
    (sweep / "1" / "run.json").write_text(json.dumps({**record, "status": "unfinished"}))
    assert main(TASK, command) == 0
    assert list(Path("outputs/wsi_mil").iterdir()) == [sweep]
    assert (sweep / "0" / "report.html").stat().st_mtime_ns == finished
    assert len(pd.read_csv(sweep / "comparison.csv")) == 2


def test_evaluation_says_how_sure_it_is_and_which_cases_were_trained_on(
    cohort: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train() == 0
    write_cohort(cohort / "new", 12, seed=5)
    data = ["data.features=new/features", "data.labels=new/labels.csv", "evaluation.bootstrap=50"]
    assert main(TASK, ["action=evaluate", "checkpoint=run", *data, "out=evaluated"]) == 0
    metrics = json.loads(Path("evaluated/metrics.json").read_text())
    assert metrics["pooled"]["auc"]["value"] > 0.6
    # The ids are the same as in training, and that is what the warning goes by.
    assert "were used to train" in metrics["notes"][-1]
    predictions = pd.read_csv("evaluated/predictions.csv")
    assert {"sd_normal", "p_grade1"} <= set(predictions.columns)
    assert Path("evaluated/report.html").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["checkpoint=nowhere"], "checkpoint=nowhere does not exist"),
        (["checkpoint=labels.csv"], "cannot be read"),
        (["checkpoint=features"], "holds no model.safetensors"),
    ],
)
def test_a_bad_checkpoint_is_one_sentence(
    overrides: list[str], sentence: str, cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(TASK, ["action=evaluate", "data.features=features", "data.labels=labels.csv", *overrides]) == 2
    assert sentence in capsys.readouterr().err


def test_features_of_another_encoder_are_refused(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("training.epochs=1", "crossval.only=[0]") == 0
    import numpy as np

    Path("wide").mkdir()
    for i in range(4):
        np.save(f"wide/{i:03d}.npy", np.zeros((3, DIM + 1), "float32"))
    code = main(
        TASK, ["action=evaluate", "checkpoint=run", "data.features=wide", "data.labels=labels.csv", "data.missing=skip"]
    )
    assert code == 2
    assert f"trained on {DIM}" in capsys.readouterr().err


def test_more_folds_than_patients_is_one_sentence(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("crossval.folds=13") == 2
    error = capsys.readouterr().err
    assert "crossval.folds" in error
    assert "patient" in error


def test_a_loss_that_is_no_number_stops_with_a_remedy(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("training.lr=1e30", "training.epochs=30", "training.batch_size=1") == 2
    error = capsys.readouterr().err
    assert "learning rate" in error or "training.lr" in error
    assert "Traceback" not in error
