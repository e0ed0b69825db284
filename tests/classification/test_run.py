"""``python -m tasks.classification`` as a user runs it, on pictures whose colours tell nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tasks.classification.__main__ import TASK, adjust
from tasks.classification.checkpoint import load_classifier
from tasks.classification.demo import CLASSES, make_images
from tasks.common.cli import help_text, main
from tasks.common.training import History
from tests.classification.pictures import write_set

QUICK = [
    "backbone=test_resnet", "data.img_size=32", "training.epochs=10", "training.lr=5e-3", "training.batch_size=16",
    "training.warmup_epochs=1", "crossval.folds=2", "crossval.val_fraction=0", "evaluation.bootstrap=100",
    "evaluation.worst=3", "augment.scale=[0.8,1]", "augment.ratio=[1,1]", "trainer.accelerator=cpu",
    "inference.device=cpu",
]  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_set(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*overrides: str, folder: str = "run", data: str = "set/images.csv") -> int:
    return main(TASK, [*QUICK, f"data.path={data}", f"out={folder}", *overrides])


def read(folder: str) -> dict[str, Any]:
    return dict(json.loads(Path(folder, "metrics.json").read_text()))


def test_a_network_beats_colour_and_is_evaluated_and_used(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("training.epochs=14", "training.batch_size=8", "training.tensorboard=true") == 0
    metrics = read("run")
    accuracy = metrics["pooled"]["accuracy"]
    assert accuracy["low"] > metrics["baseline"]["accuracy"] + 0.1
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert metrics["cost"]["parameters"] == 372_882 and metrics["cost"]["flops"] > 1e6
    printed = capsys.readouterr().out
    for part in ("Accuracy of mean colours", "Operations per image", "images/s"):
        assert part in printed
    predictions = pd.read_csv("run/predictions.csv")
    assert len(predictions) == 48 and predictions["p_true"].is_monotonic_increasing
    report = Path("run/report.html").read_text()
    assert "Judged worst" in report and "data:image/png;base64" in report
    assert "http" not in report
    for name in ("confusion_matrix", "calibration", "learning_curves", "roc"):
        assert Path(f"run/plots/{name}.png").stat().st_size > 5000
    assert len(list(Path("run/worst").glob("*.png"))) == 3
    assert not list(Path("run").rglob("*.partial*"))

    # What a fold's network says of the images it had not seen, once more.
    again = ["action=evaluate", "checkpoint=run/fold_01", "data.path=set/images.csv", "inference.device=cpu"]
    assert main(TASK, [*again, "evaluation.unseen=true", "evaluation.bootstrap=50", "out=again"]) == 0
    fold = json.loads(Path("run/fold_01/metrics.json").read_text())
    found = read("again")["pooled"]
    for name in ("accuracy", "auc", "f1_macro", "log_loss"):
        assert found[name]["value"] == pytest.approx(fold[name], abs=1e-6)
    assert main(TASK, [*again, "evaluation.bootstrap=50", "out=all"]) == 0
    assert "24 images were used to train" in read("all")["notes"][-1]
    assert main(TASK, [*again, "checkpoint=run", "evaluation.unseen=true"]) == 2

    # New images, one of them damaged: the others are predicted, and the exit code tells.
    shutil.copytree("set/down", "new/some")
    Path("new/broken.png").write_bytes(b"nothing")
    assert main(TASK, ["action=predict", "checkpoint=run", "input=new/some", "out=fine", "inference.device=cpu"]) == 0
    table = pd.read_csv("fine/predictions.csv")
    assert (table["predicted"] == "down").mean() > 0.8
    assert ((table["p_across"] + table["p_down"]) - 1).abs().max() < 1e-6
    assert {"path", "probability", "sd_down"} <= set(table.columns)
    capsys.readouterr()
    assert main(TASK, ["action=predict", "checkpoint=run", "input=new", "out=partly", "inference.device=cpu"]) == 2
    assert "1 of 25 images could not be read: new/broken.png" in capsys.readouterr().err
    assert len(pd.read_csv("partly/predictions.csv")) == 24


def test_an_interrupted_run_ends_with_the_bits_of_a_whole_one(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "training.epochs=4", "training.ema=0.9", "augment.mixup=0.4", "augment.cutmix=1", "augment.random_erasing=0.5",
        "augment.color_jitter=0.3", "augment.auto_augment=rand-m5-n1", "evaluation.worst=0",
        "+trainer.limit_train_batches=2", "trainer.accumulate_grad_batches=2", "training.class_weights=balanced",
    ]  # fmt: skip
    assert train(*options, folder="whole") == 0
    written = History.on_train_epoch_end

    def stop(self: History, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 2 and "fold_01" in str(self.path):
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
    for name in ("fold_01/history.csv", "fold_01/predictions.csv", "predictions.csv"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes(), name
    one, other = (load_classifier(Path(f, "fold_01")).models[0].state_dict() for f in ("whole", "cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    before = Path("cut/report.html").stat().st_mtime_ns
    assert train(*options, folder="cut") == 0  # finished: nothing is done again
    assert Path("cut/report.html").stat().st_mtime_ns == before


def test_a_sweep_compares_backbones_and_modules(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = [o for o in QUICK if not o.startswith(("backbone", "training.epochs"))]
    jobs = ["-m", "backbone=test_resnet", "+attention=ela,polarized_parallel", "training.epochs=1", "crossval.folds=1"]
    assert main(TASK, [*quick, *jobs, "data.path=set/images.csv", "out=sweep"]) == 0
    table = pd.read_csv("sweep/comparison.csv")
    assert list(table["job"].str.extract(r"attention=(\w+)")[0]) == ["ela", "polarized_parallel"]
    assert table["parameters"].nunique() == 2
    assert (table[["flops", "images_per_second"]] > 0).all(axis=None)
    printed = capsys.readouterr().out
    assert "images/second" in printed and "comparison" in printed


def test_the_best_epoch_many_classes_and_early_exits(pictures: Path) -> None:
    rows = ["path,label"]
    for index, path in enumerate(sorted(Path("set").rglob("*.png"))[:40]):
        rows.append(f"{path.relative_to('set').as_posix()},class{index % 10}")
    Path("set/many.csv").write_text("\n".join(rows))
    own = "backbone=tests.classification.test_model:TwoExits"
    options = ["training.select=val_loss", "crossval.val_fraction=0.4", "training.epochs=2", "crossval.folds=2"]
    assert train(own, *options, data="set/many.csv") == 0
    metrics = read("run")
    top5, top1 = metrics["pooled"]["accuracy_top5"], metrics["pooled"]["accuracy"]
    assert top5["value"] >= top1["value"] and top5["low"] <= top5["value"] <= top5["high"]
    table = pd.read_csv("run/exits.csv")
    assert table["saved"].between(0, 1).all() and table["accuracy"].between(0, 1).all()
    assert "Leaving early" in Path("run/report.html").read_text()
    history = pd.read_csv("run/fold_00/history.csv")
    kept = json.loads(Path("run/fold_00/metrics.json").read_text())["epoch"]
    assert kept == history["epoch"][history["val_loss"].idxmin()]


def test_a_dry_run_tells_and_writes_nothing(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert train("dry_run=true") == 0
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["backbone=resnet81"], "Did you mean 'resnet18'"),
        (["+attention=acmil"], "is of kind 'pooling'"),
        (["+attention=neighborhood"], "has no token mixer"),
        (["+attention=ela", "+attention.stages=[true]"], "stages"),
        (["data.img_size=0"], "data.img_size=0 must be"),
        (["data.img_size=many"], "data.img_size=many must be"),
        (["data.path=nowhere"], "data.path=nowhere does not exist"),
        (["data=cohort"], "Known: images, textures"),
        (["action=trian"], "Did you mean 'train'"),
        (["trainer.accelerator=cuda"], "has no such device"),
        (["inference.device=cuda"], "is not to be had here"),
        (["training.batch_size=0"], "training.batch_size=0"),
        (["training.epochs=0"], "training.epochs=0"),
        (["training.ema=2"], "training.ema=2"),
        (["training.optimizer=adamm"], "training.optimizer"),
        (["training.select=val_los", "crossval.val_fraction=0.3"], "val_los"),
        (["training.class_weights=heavy"], "class_weights"),
        (["training.sampling=even"], "training.sampling"),
        (["augment.auto_augment=autox"], "augment"),
        (["augment.mixup=-1"], "mixup"),
        (["data.crop_mode=round"], "crop_mode"),
        (["data.window=[9,1]"], "data.window"),
        (["data.clases=[a]"], "Did you mean 'data.classes'"),
        (["data.label_column=lable"], "Did you mean 'label'"),
        (["crossval.folds=1", "crossval.test_fraction=2"], "crossval.test_fraction"),
        (["crossval.folds=40"], "crossval.folds"),
        (["backbone.checkpoint=nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["action=evaluate"], "needs checkpoint=RUN"),
        (["action=evaluate", "checkpoint=nowhere"], "checkpoint=nowhere does not exist"),
        (["action=predict", "checkpoint=set/images.csv"], "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    overrides: list[str], sentence: str, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if "cuda" in "".join(overrides):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        if torch.cuda.device_count():
            pytest.skip("there is a GPU here")
    assert train(*overrides) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("error:") == 1 and "Traceback" not in error
    if "val_los" not in overrides[0]:
        assert not Path("run").exists()


def test_every_bad_image_is_named_before_training(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("set/down/zzz.png").write_bytes(b"")
    Path("set/across/zzz.jpg").write_text("text")
    Path("set/one").mkdir()
    shutil.copy("set/down/002.png", "set/one/002.png")
    assert train(data="set") == 2
    error = capsys.readouterr().err
    assert "3 problems with the data" in error
    for part in ("zzz.png is empty", "zzz.jpg cannot be read", "class 'one' has 1 image"):
        assert part in error
    assert not Path("run").exists()


def test_a_checkpoint_of_another_task_or_of_other_classes_is_refused(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, "other.safetensors", metadata={"fovea_wsi_mil": "{}"})
    assert main(TASK, ["action=predict", "checkpoint=other.safetensors", "input=set"]) == 2
    assert "was not written by tasks.classification" in capsys.readouterr().err
    assert train("training.epochs=1", "crossval.only=[0]") == 0
    write_set(pictures / "three", 6, classes=3)
    assert main(TASK, ["action=evaluate", "checkpoint=run", "data.path=three"]) == 2
    assert "label plain is not one of the checkpoint's classes" in capsys.readouterr().err


def test_the_demo_is_made_once_and_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = make_images(tmp_path / "demo", 32, seed=3)
    before = table.stat().st_mtime_ns
    assert make_images(tmp_path / "demo", 32, seed=3).stat().st_mtime_ns == before
    frame = pd.read_csv(table)
    assert frame["label"].value_counts().to_dict() == dict.fromkeys(CLASSES, 8)
    assert frame["patient"].nunique() == 4
    other = make_images(tmp_path / "twin", 32, seed=3)
    assert all((other.parent / p).read_bytes() == (table.parent / p).read_bytes() for p in frame["path"])
    demo = [f"data.textures.folder={tmp_path / 'demo'}", "data.textures.images=32", "data.textures.seed=3"]
    quick = [
        "training.epochs=1",
        "crossval.folds=1",
        "crossval.test_fraction=0.25",
        "evaluation.bootstrap=20",
        "data.img_size=32",
    ]
    assert main(TASK, [*demo, *quick, f"out={tmp_path / 'run'}"]) == 0
    assert "test_resnet" in capsys.readouterr().out
    assert main(TASK, [*demo[:1], f"out={tmp_path / 'no'}"]) == 2
    assert "holds other files" in capsys.readouterr().err


def test_the_command_line_knows_its_data() -> None:
    assert adjust([]) == ["data=textures", "backbone=test_resnet"]
    assert adjust(["backbone=resnet18"]) == ["backbone=resnet18", "data=textures"]
    assert adjust(["data=/some/folder", "backbone=resnet18"]) == ["data.path=/some/folder", "backbone=resnet18"]
    assert adjust(["action=predict"]) == ["action=predict"]
    text = help_text(TASK)
    assert "data: images, textures" in text and "mil_benchmark" not in text
