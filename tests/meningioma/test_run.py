"""``python -m tasks.meningioma`` as a user runs it, on small heads with bright balls."""

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf

from tasks.common.cli import help_text, main
from tasks.common.training import History
from tasks.meningioma.__main__ import TASK, adjust
from tasks.meningioma.outcomes import Outcomes

QUICK = [
    "network=unet3d", "network.filters=[4,8]", "data.preparation.recipe=whole", "data.preparation.size=[16,16,16]",
    "data.preparation.spacing=[3,3,3]", "augment.name=none", "training.epochs=30", "training.lr=2e-2",
    "training.loss=dice_ce", "training.batch_size=4", "training.norm_momentum=0.3", "training.select=last",
    "training.patience=null", "crossval.folds=2", "crossval.val_fraction=0.3", "evaluation.bootstrap=60",
    "evaluation.worst=2", "evaluation.object_voxels=5", "trainer.accelerator=cpu", "inference.device=cpu",
]  # fmt: skip
AFFINES = (np.diag([3.0, 3, 3, 1]), np.array([[-3.0, 0, 0, 60], [0, 0, 3, -20], [0, -3, 0, 9], [0, 0, 0, 1]]))


def head(seed: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """A dim ball with a bright one in it, and where that is."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*[np.arange(16.0)] * 3, indexing="ij"))
    skull = np.square(places - 7.5).sum(0) < 49
    middle = rng.uniform(5.5, 9.5, 3)[:, None, None, None]
    tumour = np.square(places - middle).sum(0) < rng.uniform(4, 7)
    values = 100 * skull + 100 * tumour + rng.normal(0, 6, skull.shape)
    return values.astype(np.int16), (tumour & skull).astype(np.uint8)


def write_set(folder: Path, cases: int = 8) -> Path:
    """Plain folders, two of the cases of one patient, on grids of two orientations."""
    rows = []
    for number in range(cases):
        image, label = head(number)
        if number == 3:
            label[:] = 0
            image = np.minimum(image, 110).astype(np.int16)
        affine = AFFINES[number % 2]
        place = folder / f"case_{number}"
        place.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(image, affine), place / "t1c.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, affine), place / "seg.nii.gz")
        patient = "twice" if number in (0, 1) else f"p{number}"
        row = {"case_id": f"case_{number}", "image": f"case_{number}/t1c.nii.gz", "patient": patient}
        rows.append({**row, "label": f"case_{number}/seg.nii.gz", "date": f"2020-0{1 + number}-01"})
    table = folder / "cases.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    return table


@pytest.fixture
def heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_set(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOVEA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def train(*overrides: str, folder: str = "run", data: str = "set/cases.csv") -> int:
    return main(TASK, [*QUICK, f"data.path={data}", f"out={folder}", *overrides])


def read(folder: str) -> dict[str, Any]:
    return dict(json.loads(Path(folder, "metrics.json").read_text()))


def test_a_network_learns_and_is_evaluated_and_used(heads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    metrics = read("run")
    dice = metrics["pooled"]["dice"]
    assert dice["value"] > 0.6 and dice["low"] <= dice["value"] <= dice["high"]
    assert set(metrics["conventions"]) == {"all", "positive", "tp"}
    assert metrics["objects"]["recall"]["of"] == 7 and metrics["volumes"]["cases"] >= 7
    assert "8 cases of 7 patients" in capsys.readouterr().out
    table = pd.read_csv("run/results.csv")
    assert len(table) == 8 and table["dice"].dropna().is_monotonic_increasing
    report = Path("run/report.html").read_text()
    for part in ("Worst cases", "Growth", "data:image/png;base64", "convention", "1 case has an empty label"):
        assert part.lower() in report.lower(), part
    assert "http" not in report
    # The mask of a case lies on its scan, and has the volume that the table states.
    for row in table.to_dict("records"):
        mask, scan = nibabel.load(f"run/{row['mask']}"), nibabel.load(f"set/{row['case_id']}/t1c.nii.gz")
        assert mask.get_data_dtype() == np.uint8 and np.array_equal(mask.affine, scan.affine)
        truth = np.asarray(nibabel.load(f"set/{row['case_id']}/seg.nii.gz").dataobj) > 0
        found = np.asarray(mask.dataobj) > 0
        assert row["predicted_ml"] == pytest.approx(found.sum() * 0.027)
        if truth.any():
            both = 2 * (truth & found).sum() / (truth.sum() + found.sum())
            assert row["dice"] == pytest.approx(both)
    growth = pd.read_csv("run/growth.csv")
    assert list(growth["patient"]) == ["twice"] and growth["ml_low"][0] <= growth["ml"][0] <= growth["ml_high"][0]

    # What a fold's network says of the cases it had not seen, once more.
    again = ["action=evaluate", "checkpoint=run/fold_01", "data.path=set/cases.csv", "inference.device=cpu"]
    limits = ["evaluation.bootstrap=60", "evaluation.object_voxels=5", "evaluation.worst=1"]
    assert main(TASK, [*again, *limits, "evaluation.unseen=true", "out=again"]) == 0
    fold = json.loads(Path("run/fold_01/metrics.json").read_text())
    assert read("again")["pooled"]["dice"]["value"] == pytest.approx(fold["dice"], abs=1e-6)
    assert main(TASK, [*again, "checkpoint=run", "evaluation.unseen=true"]) == 2

    # A new scan, and one that cannot be read: the first is segmented, and the exit code tells.
    Path("new").mkdir()
    shutil.copy("set/case_5/t1c.nii.gz", "new/fine.nii.gz")
    Path("new/broken.nii.gz").write_bytes(Path("set/case_5/t1c.nii.gz").read_bytes()[:900])
    capsys.readouterr()
    use = ["action=predict", "checkpoint=run", "input=new", "out=used", "inference.device=cpu"]
    assert main(TASK, use) == 2
    said = capsys.readouterr().err
    assert "1 of 2 scans could not be segmented" in said and "broken.nii.gz" in said
    assert "Traceback" not in said
    probabilities = nibabel.load("used/fine/probabilities.nii.gz")
    assert probabilities.get_data_dtype() == np.float32 and probabilities.shape == (16, 16, 16)
    assert probabilities.get_fdata().min() >= 0 and probabilities.get_fdata().max() <= 1
    volumes = pd.read_csv("used/volumes.csv")
    mask = np.asarray(nibabel.load("used/fine/mask.nii.gz").dataobj)
    assert volumes["seg_ml" if "seg_ml" in volumes else volumes.columns[2]][0] == pytest.approx(mask.sum() * 0.027)
    assert Path("used/fine/slices.png").stat().st_size > 2000 and Path("used/report.html").exists()
    assert sorted(p.name for p in Path("new").iterdir()) == ["broken.nii.gz", "fine.nii.gz"]  # nothing beside the input
    # What is done is not done again.
    before = Path("used/fine/mask.nii.gz").stat().st_mtime_ns
    Path("new/broken.nii.gz").unlink()
    shutil.copy("set/case_6/t1c.nii.gz", "new/broken.nii.gz")
    assert main(TASK, [*use, "out=used2"]) == 0
    assert main(TASK, [*use, "out=used2"]) == 0
    assert Path("used/fine/mask.nii.gz").stat().st_mtime_ns == before


def test_an_interrupted_run_ends_with_the_bits_of_a_whole_one(heads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["training.epochs=4", "augment.name=paper", "training.select=val_dice", "evaluation.worst=0"]
    assert train(*options, folder="whole") == 0
    written, added = History.on_train_epoch_end, Outcomes.add

    def stop(self: History, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 2 and "fold_01" in str(self.path):
            raise RuntimeError("the plug was pulled")
        written(self, trainer, module)

    def stop_testing(self: Outcomes, *arguments: Any) -> None:
        if "fold_01" in str(self.folder) and list((self.folder / "scores").glob("*.json")):
            raise RuntimeError("the plug was pulled again")
        added(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(History, "on_train_epoch_end", stop)
        with pytest.raises(RuntimeError, match="plug"):
            train(*options, folder="cut")
    first = Path("cut/fold_00/model.safetensors").stat().st_mtime_ns
    torch.manual_seed(123)
    with monkeypatch.context() as patch:
        patch.setattr(Outcomes, "add", stop_testing)
        with pytest.raises(RuntimeError, match="again"):
            train(*options, folder="cut")
    trained = Path("cut/fold_01/model.safetensors").stat().st_mtime_ns
    (scored,) = Path("cut/fold_01/scores").glob("*.json")
    done = scored.stat().st_mtime_ns
    assert train(*options, folder="cut") == 0
    assert Path("cut/fold_00/model.safetensors").stat().st_mtime_ns == first
    assert Path("cut/fold_01/model.safetensors").stat().st_mtime_ns == trained
    assert scored.stat().st_mtime_ns == done
    for name in ("fold_01/history.csv", "fold_01/predictions.csv", "results.csv", "fold_01/model.safetensors"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes(), name
    before = Path("cut/report.html").stat().st_mtime_ns
    assert train(*options, folder="cut") == 0  # finished: nothing is done again
    assert Path("cut/report.html").stat().st_mtime_ns == before


def test_patches_at_native_resolution_with_flips_and_a_searched_cutoff(heads: Path) -> None:
    options = [
        "data.preparation.recipe=sliding", "data.preparation.patch=[8,8,8]", "data.preparation.spacing=null",
        "inference.flips=axes", "inference.overlap=0.25", "training.epochs=2", "crossval.only=[0]",
        "evaluation.probabilities=true", "inference.smallest_ml=0.05", "+attention=polarized_parallel",
    ]  # fmt: skip
    assert train(*options) == 0
    fold = json.loads(Path("run/fold_00/metrics.json").read_text())
    assert fold["cutoff"] is None or 0.1 <= fold["cutoff"] <= 1
    assert len(list(Path("run/fold_00/probabilities").glob("*.nii.gz"))) == fold["cases"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["network=agunett"], "agunet"),
        (["network=agunet", "data.preparation.size=[16,16,16]", "network.filters=[4,8,8,8,8]"], "axis"),
        (["+attention=acmil"], "pooling"),
        (["backbone=resnet18"], "two axes"),
        (["training.loss=dicee"], "training.loss"),
        (["inference.cutoff=2"], "inference.cutoff=2"),
        (["inference.flip_axes=0"], "inference.flip_axes=0 must be a list of numbers"),
        (["inference.flips=some"], "inference.flips=some"),
        (["evaluation.overlap=1"], "evaluation.overlap=1"),
        (["augment.name=wild"], "augment"),
        (["training.batch_size=0"], "training.batch_size=0"),
        (["data.preparation.recipe=half"], "data.preparation.recipe"),
        (["action=predict"], "checkpoint=RUN"),
        (["action=predict", "checkpoint=nowhere"], "nowhere does not exist"),
        (["action=segment"], "action"),
        (["data.path=missing"], "data.path=missing does not exist"),
        (["trainer.accelerator=tpuu"], "accelerator"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    heads: Path, overrides: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*overrides) != 0
    error = capsys.readouterr().err.strip()
    assert said in error and "Traceback" not in error
    assert not Path("run").exists()


def test_bad_files_are_named_all_at_once(heads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, label = head(0)
    nibabel.save(nibabel.Nifti1Image(label[:-1], AFFINES[0]), "set/case_0/seg.nii.gz")
    shifted = AFFINES[1] + np.array([[0, 0, 0, 5.0]] + [[0.0] * 4] * 3)
    nibabel.save(nibabel.Nifti1Image(label, shifted), "set/case_1/seg.nii.gz")
    Path("set/case_2/t1c.nii.gz").write_bytes(Path("set/case_2/t1c.nii.gz").read_bytes()[:500])
    holes = image.astype(np.float32)
    holes[3, 3, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(holes, AFFINES[0]), "set/case_4/t1c.nii.gz")
    nibabel.save(nibabel.Nifti1Image(image[:, :, :1], AFFINES[0]), "set/case_6/t1c.nii.gz")
    assert train() == 2
    said = capsys.readouterr().err
    for part in ("case_0", "case_1", "case_2", "NaN", "16 x 16 x 1"):
        assert part in said
    assert "Traceback" not in said and not Path("run").exists()


def test_the_bare_command_is_the_demo_and_the_help_names_the_networks() -> None:
    assert adjust([]) == ["data=heads"]
    assert adjust(["data=./some"]) == ["data.path=./some"]
    assert adjust(["action=predict"]) == ["action=predict"]
    text = help_text(TASK)
    for name in ("agunet", "daunet", "dagunet", "swin_unetr", "nnU-Net folder", "-m data=DIR"):
        assert name in text


def test_new_scans_are_segmented_as_the_test_cases_were_unless_said_otherwise(heads: Path) -> None:
    chosen = ["inference.flips=axes", "inference.flip_axes=[0]", "inference.cutoff=0.4", "inference.smallest_ml=0.1"]
    assert train(*chosen, "training.epochs=1", "crossval.only=[0]") == 0
    use = ["action=predict", "checkpoint=run", "input=set/case_5/t1c.nii.gz", "inference.device=cpu"]
    assert main(TASK, [*use, "out=same"]) == 0
    assert main(TASK, [*use, "out=other", "inference.flips=none", "inference.cutoff=argmax"]) == 0
    same, other = (OmegaConf.load(Path(folder, "config.yaml")).inference for folder in ("same", "other"))
    assert (same.flips, list(same.flip_axes), same.cutoff, same.smallest_ml) == ("axes", [0], 0.4, 0.1)
    assert (other.flips, other.cutoff, other.smallest_ml) == ("none", "argmax", 0.1)
    assert pd.read_csv("same/volumes.csv")["cutoff"][0] == 0.4


def test_folds_that_come_with_the_data_get_validation_cases(heads: Path) -> None:
    root = Path("nnunet")
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    names = [f"case_{number}" for number in range(6)]
    for name in names:
        shutil.copy(f"set/{name}/t1c.nii.gz", root / "imagesTr" / f"{name}_0000.nii.gz")
        shutil.copy(f"set/{name}/seg.nii.gz", root / "labelsTr" / f"{name}.nii.gz")
    about = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "tumour": 1}, "numTraining": 6}
    (root / "dataset.json").write_text(json.dumps({**about, "file_ending": ".nii.gz"}))
    (root / "splits_final.json").write_text(json.dumps([{"train": names[:4], "val": names[4:]}]))
    assert train("training.epochs=1", data="nnunet") == 0
    split = pd.read_csv(next(Path("run/splits").glob("*.csv")))
    assert len(pd.read_csv("run/results.csv")) == 2
    assert split["val"].notna().sum() == 1 and split["train"].notna().sum() == 3
