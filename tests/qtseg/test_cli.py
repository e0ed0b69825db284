"""What is wrong with the options, the files or a checkpoint is said in one sentence, before anything is written."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tasks.common.cli import main
from tasks.qtseg.__main__ import TASK
from tests.qtseg.squares import read_picture, write_set
from tests.qtseg.test_run import QUICK, train


@pytest.fixture
def squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_set(tmp_path / "set", count=8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.preset=isic2061"], "Did you mean 'isic2016'"),
        (["data.preset=drive"], "a CSV goes with data.preset=folders"),
        (["decoder=unett"], "Did you mean 'unet'"),
        (["decoder=no.such:Class"], "cannot be imported"),
        (["decoder.widht=3"], "Did you mean 'decoder.width'"),
        (["backbone=resnet81"], "Did you mean 'resnet18'"),
        (["backbone=test_resnet", "backbone.checkpoint=nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["decoder=attention_unet", "backbone=test_resnet"], "has an encoder of its own"),
        (["+attention=acmil"], "kind 'pooling'"),
        (["+attention=elaa"], "Did you mean 'ela'"),
        (["attention=ela"], "add it with a plus sign"),
        (["recipe=isik"], "recipe"),
        (["protocol=honets"], "Did you mean 'honest'"),
        (["data.path=nowhere"], "data.path=nowhere does not exist"),
        (["data=images"], "Known: segmentation2d, shapes2d"),
        (["action=trian"], "Did you mean 'train'"),
        (["data.img_size=0"], "data.img_size"),
        (["data.resize=tile"], "Did you mean 'tiles'"),
        (["data.augment.policy=papr"], "Did you mean 'paper'"),
        (["data.labels={lesion: 7}"], "holds values that data.labels does not name"),
        (["training.loss=dise"], "Did you mean 'dice'"),
        (["training.batch_size=0"], "training.batch_size=0"),
        (["training.draws=0"], "training.draws=0"),
        (["training.freeze_epochs=-1"], "training.freeze_epochs=-1"),
        (["training.epochs=0"], "training.epochs=0"),
        (["training.optimizer=adamm"], "training.optimizer"),
        (["crossval.folds=40"], "crossval.folds"),
        (["crossval.splits=published"], "no folds were published"),
        (["crossval.only=[7]"], "there is no fold 7"),
        (["inference.tile=64"], "goes with data.resize=tiles"),
        (["inference.cutoff=2"], "inference.cutoff=2"),
        (["inference.flips=some"], "inference.flips=some"),
        (["inference.overlap=1"], "inference.overlap=1"),
        (["evaluation.empty=none"], "evaluation.empty"),
        (["evaluation.vessels=yes"], "evaluation.vessels"),
        (["evaluation.tolerance=0"], "evaluation.tolerance"),
        (["out=set/images/run"], "which holds the images"),
        (["action=evaluate"], "needs checkpoint=RUN"),
        (["action=evaluate", "checkpoint=nowhere"], "checkpoint=nowhere does not exist"),
        (["action=predict", "checkpoint=set/images.csv"], "cannot be read"),
        (["action=export"], "needs checkpoint=RUN"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_sentence_and_leaves_nothing(
    overrides: list[str], sentence: str, squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_decoder = any(o.startswith("decoder=") for o in overrides)
    options = [o for o in QUICK if not (own_decoder and o.startswith("decoder"))]
    options = [o for o in options if not ("backbone=" in str(overrides) and "depth" in o)]
    out = [] if any(o.startswith("out=") for o in overrides) else ["out=run"]
    assert main(TASK, [*options, "data.path=set/images.csv", *out, *overrides]) == 2
    error = capsys.readouterr().err
    assert sentence in error, error
    assert error.count("error:") == 1 and "Traceback" not in error
    assert not Path("run").exists() and not Path("set/images/run").exists()


def test_every_file_that_is_wrong_is_named_before_training(squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("set/images/case_00.png").write_bytes(Path("set/images/case_00.png").read_bytes()[:200])
    Image.fromarray(np.zeros((9, 9), np.uint8)).save("set/masks/case_01.png")
    grey = read_picture("set/masks/case_02.png").copy()
    grey[:3, :3] = 77
    Image.fromarray(grey).save("set/masks/case_02.png")
    assert train() == 2
    error = capsys.readouterr().err
    assert "3 problems with the data" in error and "Traceback" not in error
    for part in ("case_00.png", "case_01.png is 9 x 9", "77: 9 pixels"):
        assert part in error
    Path("set/images.csv").unlink()
    shutil.rmtree("set/masks")
    assert train(data="set") == 2
    assert not Path("run").exists()


def test_a_missing_partner_an_id_that_is_a_path_and_empty_masks_are_refused(
    squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("set/masks/case_03.png").rename("other.png")
    assert train(data="set") == 2
    assert "case_03" in capsys.readouterr().err
    Path("other.png").rename("set/masks/case_03.png")
    table = Path("set/images.csv").read_text()
    Path("set/bad.csv").write_text(table.replace("case_00\n", "../../case_00\n"))
    assert train(data="set/bad.csv") == 2
    assert "cannot be used as a file name" in capsys.readouterr().err
    for path in Path("set/masks").glob("*.png"):
        Image.fromarray(np.zeros_like(read_picture(path))).save(path)
    assert train() == 2
    assert "all masks are empty" in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_dry_run_writes_nothing(squares: Path) -> None:
    assert train("dry_run=true") == 0
    assert main(TASK, ["dry_run=true"]) == 0
    assert not Path("run").exists() and not Path("outputs").exists()


def test_a_checkpoint_of_another_task_or_of_other_classes_is_refused(
    squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"a": torch.zeros(1)}, "other.safetensors", metadata={"fovea_wsi_mil": "{}"})
    assert main(TASK, ["action=predict", "checkpoint=other.safetensors", "input=set"]) == 2
    assert "was not written by tasks.qtseg" in capsys.readouterr().err
    assert train("training.epochs=1", "crossval.only=[0]", "evaluation.worst=0") == 0
    evaluate = ["action=evaluate", "checkpoint=run", "data.path=set/images.csv", "out=no", "inference.device=cpu"]
    assert main(TASK, [*evaluate, "data.labels={benign: 255, malignant: 1}"]) == 2
    error = capsys.readouterr().err
    assert "has the 3 classes" in error and "checkpoint the 2 classes" in error
    predict = ["action=predict", "checkpoint=run", "inference.device=cpu"]
    for options, sentence in (
        (["input=set/images", "inference.tile=64"], "goes with data.resize=tiles"),
        (["input=nothing"], "input=nothing does not exist"),
        ([], "needs input=PATH"),
        (["input=set/images", "out=set/images"], "which holds the images"),
        (["input=set/images", "inference.flip_axes=[2]", "inference.flips=axes"], "has axes 0 to 1"),
        (["input=set/images", "inference.flip_axes=2", "inference.flips=axes"], "inference.flip_axes=2 must be a list"),
    ):
        assert main(TASK, [*predict, *options]) == 2
        assert sentence in capsys.readouterr().err
