"""Which cases are found in each layout, and everything that is wrong with a set at once."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from omegaconf import OmegaConf

from kernels.errors import InputError
from tasks.meningioma.cases import as_classes, parse_labels
from tasks.meningioma.checking import count_components
from tasks.meningioma.data import Checked, load_cases, overview
from tests.common.made_volumes import affine_of, write_pair

CONFIG = Path(__file__).parents[2] / "conf" / "data" / "volumes.yaml"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_CACHE", str(tmp_path_factory.mktemp("cache")))


def load(path: Path | None, **options: Any) -> Checked:
    return load_cases(OmegaConf.merge(OmegaConf.load(CONFIG), {"path": None if path is None else str(path), **options}))


def refused(path: Path | None, **options: Any) -> str:
    with pytest.raises(InputError) as raised:
        load(path, **options)
    return str(raised.value)


def nnunet(root: Path, count: int = 3, channels: int = 1, about: dict[str, Any] | None = None) -> Path:
    for number in range(count):
        for channel in range(channels):
            names = f"imagesTr/M_{number}_{channel:04d}.nii.gz", f"labelsTr/M_{number}.nii.gz"
            write_pair(root, seed=number, names=names)
    content = {
        "channel_names": {str(c): f"T{c + 1}" for c in range(channels)},
        "labels": {"background": 0, "meningioma": 1},
        "numTraining": count,
        "file_ending": ".nii.gz",
    }
    content |= about or {}
    if "modality" in content:
        del content["channel_names"]
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def table(root: Path, rows: list[str], header: str = "case_id,image,label,patient,date,split") -> Path:
    path = root / "cases.csv"
    path.write_text("\n".join([header, *rows]))
    return path


def test_a_folder_per_case(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_pair(tmp_path / name, names=(f"{name}_T1C.nii.gz", f"{name}_seg.nii.gz"))
        write_pair(tmp_path / name, names=(f"{name}_flair.nii.gz", "seg.txt.nii"))
        (tmp_path / name / "seg.txt.nii").unlink()
    checked = load(tmp_path)
    assert [case.case_id for case in checked.cases.cases] == ["a", "b", "c"]
    assert checked.cases.cases[0].images[0].name == "a_T1C.nii.gz"
    assert checked.cases.classes == ("background", "tumour")
    ml = checked.table["tumour_ml"]
    assert np.allclose(ml, 4 / 3 * np.pi * 7 * 6 * 8 / 1000, rtol=0.02)
    assert list(checked.table["components"]) == [1, 1, 1]
    assert any("3 cases of 3 patients" in line for line in overview(checked))
    two = load(tmp_path, image_names=["flair", "t1c"]).cases.cases[0]
    assert [path.name for path in two.images] == ["a_flair.nii.gz", "a_T1C.nii.gz"]
    assert "no images called 'dwi'" in refused(tmp_path, image_names=["dwi"])
    write_pair(tmp_path / "a", names=("x_1.nii.gz", "other_mask.nii.gz"))
    assert "several labels" in refused(tmp_path) and "data.label_name" in refused(tmp_path)
    assert load(tmp_path, label_name="a_seg", image_names=["t1c"]) is not None


def test_images_and_labels_with_equal_names(tmp_path: Path) -> None:
    for number in range(4):
        write_pair(tmp_path, names=(f"images/p{number // 2}_{number}.nii.gz", f"labels/p{number // 2}_{number}.nii.gz"))
    checked = load(tmp_path, patient_pattern="^(p[0-9])")
    assert [case.patient for case in checked.cases.cases] == ["p0", "p0", "p1", "p1"]
    (tmp_path / "labels" / "p1_3.nii.gz").rename(tmp_path / "labels" / "other.nii.gz")
    assert "without an image of the same name: 'other.nii.gz'" in refused(tmp_path)
    (tmp_path / "labels" / "other.nii.gz").unlink()
    checked = load(tmp_path)
    assert len(checked.cases.labelled) == 3
    assert any("1 cases have no label" in note for note in checked.cases.notes)
    assert "does not match" in refused(tmp_path, patient_pattern="^(q)")
    assert "no regular expression" in refused(tmp_path, patient_pattern="(")


def test_train_and_test_folders_are_the_split(tmp_path: Path) -> None:
    for side in ("train", "test"):
        write_pair(tmp_path / side / f"case_{side}")
        write_pair(tmp_path / side / "P1" if side == "train" else tmp_path / side / "P2")
    cases = load(tmp_path).cases.cases
    assert {case.case_id: case.split for case in cases} == {
        "P1": "train", "P2": "test", "case_test": "test", "case_train": "train"
    }  # fmt: skip
    write_pair(tmp_path / "test" / "P1")
    assert "more than one case called 'P1'" in refused(tmp_path)
    assert "patient 'P1' is in test and in train" in refused(tmp_path)


def test_nnunet_folders_with_their_folds(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "Dataset001_M", channels=2)
    (root / "splits_final.json").write_text(json.dumps([{"train": ["M_0", "M_1"], "val": ["M_2"]}]))
    (root / "imagesTs").mkdir()
    (root / "imagesTs" / "M_9_0000.nii.gz").write_text("")
    checked = load(root)
    case = checked.cases.cases[1]
    assert [path.name for path in case.images] == ["M_1_0000.nii.gz", "M_1_0001.nii.gz"]
    assert checked.cases.classes == ("background", "meningioma")
    assert checked.cases.folds is not None and checked.cases.folds[0].test == ["M_2"]
    assert any("imagesTs" in note for note in checked.cases.notes)
    (root / "splits_final.json").write_text(json.dumps([{"train": ["M_0", "M_1"], "val": ["M_1", "M_7"]}]))
    message = refused(root)
    assert "names 'M_7'" in message and "'M_1' in both" in message
    (root / "imagesTr" / "M_0_0001.nii.gz").unlink()
    assert "no image 'M_0_0001.nii.gz'" in refused(root)
    (root / "splits_final.json").write_text("[{}]")
    assert "must be a list of objects" in refused(root)
    (root / "dataset.json").write_text("{")
    assert "is not valid JSON" in refused(root)


def test_older_descriptions_and_lists_of_paths(tmp_path: Path) -> None:
    old = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "tumour"}}
    entries = [{"image": f"./imagesTr/M_{n}.nii.gz", "label": f"./labelsTr/M_{n}.nii.gz"} for n in range(3)]
    root = nnunet(tmp_path / "Task1", about={"training": entries, **old})
    checked = load(root)
    assert checked.cases.classes == ("background", "tumour")
    assert checked.cases.cases[2].images[0].name == "M_2_0000.nii.gz"
    assert any("CT" in note for note in checked.cases.notes)
    listed = {"x": {"images": ["imagesTr/M_0_0000.nii.gz"], "label": "labelsTr/M_0.nii.gz"}}
    assert load(nnunet(root, about={"dataset": listed})).cases.cases[0].case_id == "x"
    listed["x"]["images"] = ["../M_0_0000.nii.gz"]
    assert "lies outside" in refused(nnunet(root, about={"dataset": listed}))
    entries[0]["image"] = "imagesTr/none.nii.gz"
    assert "there is no file" in refused(nnunet(root, about={"training": entries}))


def test_channels_in_one_file(tmp_path: Path) -> None:
    image, label = write_pair(tmp_path, names=("imagesTr/B.nii.gz", "labelsTr/B.nii.gz"))
    one = nib.load(image)
    nib.save(nib.Nifti1Image(np.stack([one.get_fdata(), -one.get_fdata()], -1), one.affine), image)
    about = {
        "modality": {"0": "FLAIR", "1": "T1"},
        "labels": {"0": "background", "1": "tumour"},
        "training": [{"image": "imagesTr/B.nii.gz", "label": "labelsTr/B.nii.gz"}],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    case = load(tmp_path).cases.cases[0]
    first, second = case.read_images()
    np.testing.assert_array_equal(first.data, -second.data)
    folder = tmp_path / "folders" / "a"
    folder.mkdir(parents=True)
    image.rename(folder / "image.nii.gz")
    label.rename(folder / "label.nii.gz")
    assert "choose one with channel=0 to 1" in refused(folder.parent)
    assert load(folder.parent, channel=1).cases.cases[0].channels == (1,)


def test_a_table(tmp_path: Path) -> None:
    for n in range(3):
        write_pair(tmp_path / f"v{n}")
    rows = [
        f"c{n},v{n}/t1c.nii.gz,v{n}/seg.nii.gz,p{n // 2},2020-0{n + 1}-15,{'test' if n == 2 else 'train'}"
        for n in range(3)
    ]
    path = table(tmp_path, rows)
    cases = load(path).cases
    assert [(c.case_id, c.patient, c.date, c.split) for c in cases.cases] == [
        ("c0", "p0", date(2020, 1, 15), "train"),
        ("c1", "p0", date(2020, 2, 15), "train"),
        ("c2", "p1", date(2020, 3, 15), "test"),
    ]
    before = cases.fingerprint()
    assert before == load(path).cases.fingerprint()
    assert before != load(table(tmp_path, [*rows[:2], rows[2].replace("p1", "p9")])).cases.fingerprint()
    bad = [
        "c0,v0/t1c.nii.gz,v0/seg.nii.gz,p0,2020-13-40,nowhere",
        "../x,v0/t1c.nii.gz,v0/seg.nii.gz,p0,,",
        f"c2,{tmp_path}/v0/t1c.nii.gz,v0/../v0/seg.nii.gz,p0,,train",
        "c3,,v0/none.nii.gz,p0,,test",
        "c4,v0/t1c.nii.gz,v0/seg.nii.gz,p4,,test",
        "c5,v0/t1c.nii.gz,v0/seg.nii.gz,p4,,train",
    ]
    message = refused(table(tmp_path, bad))
    for part in (
        "row 2: split 'nowhere'", "row 2: date '2020-13-40'", "row 3: id '../x' cannot", "row 4: '/", "row 4: 'v0/..",
        "row 5 has no image", "no file 'v0/none.nii.gz'", "patient 'p4' is in test and in train",
    ):  # fmt: skip
        assert part in message, part
    assert "has no column 'case_id'" in refused(table(tmp_path, ["a,b"], "image,label"))
    assert "twice" in refused(table(tmp_path, [rows[0], rows[0]])) or "more than one" in refused(
        table(tmp_path, [rows[0], rows[0]])
    )
    unlabelled = table(tmp_path, ["c0,v0/t1c.nii.gz"], "case_id,image")
    assert "no case has a label" in refused(unlabelled)
    two = table(tmp_path, ["c0,v0/t1c.nii.gz,v1/t1c.nii.gz,v0/seg.nii.gz"], "case_id,image,image2,label")
    assert len(load(two).cases.cases[0].images) == 2


def test_all_problems_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    for name in ("good", "cut", "nan", "flat", "shape", "moved"):
        write_pair(tmp_path / name, affine=affine_of("LPS"))
    cut = tmp_path / "cut" / "t1c.nii.gz"
    cut.write_bytes(cut.read_bytes()[:2000])
    for name, change in (("nan", np.nan), ("flat", 0.0)):
        image = nib.load(tmp_path / name / "t1c.nii.gz")
        data = image.get_fdata()
        data[...] = data * change if name == "flat" else np.where(data > 900, change, data)
        nib.save(nib.Nifti1Image(data, image.affine), tmp_path / name / "t1c.nii.gz")
    label = nib.load(tmp_path / "good" / "seg.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj)[:-1], label.affine), tmp_path / "shape" / "seg.nii.gz")
    affine = label.affine.copy()
    affine[0, 3] += 0.5
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), affine), tmp_path / "moved" / "seg.nii.gz")
    message = refused(tmp_path)
    for part in (
        "5 problems", "cut/t1c.nii.gz cannot be read", "NaN or infinite", "only zeros",
        "its shape is 39 x 44 x 36, the image's 40 x 44 x 36", "differs by up to 0.5", "axes LPS",
    ):  # fmt: skip
        assert part in message, part
    affine[0, 3] -= 0.5 - 1e-5
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), affine), tmp_path / "moved" / "seg.nii.gz")
    assert "4 problems" in refused(tmp_path)


def test_values_of_labels_become_classes(tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        _, label = write_pair(tmp_path / name)
        image = nib.load(label)
        data = np.asarray(image.dataobj).copy()
        x = np.argwhere(data)[:, 0].mean()
        data[: int(x)] *= 4 if number else 1
        if name == "c":
            data[...] = 0
        nib.save(nib.Nifti1Image(data, image.affine), label)
    message = refused(tmp_path)
    assert "1 (" in message and "4 (" in message and "data.labels={tumour: [1, 4]}" in message
    both = load(tmp_path, labels={"tumour": [1, 4]})
    assert both.table["tumour_ml"][0] == pytest.approx(both.table["tumour_ml"][1])
    assert any("'c'" in note and "controls" in note for note in both.cases.notes)
    apart = load(tmp_path, labels={"core": 4, "rim": 1})
    assert apart.cases.classes == ("background", "core", "rim")
    values = apart.cases.read_label(apart.cases.cases[1]).data
    assert values.dtype == np.uint8 and set(np.unique(values)) == {0, 1, 2}
    one = load(tmp_path, labels={"core": 4})
    assert any("does not name are background: 1 (" in note for note in one.cases.notes)
    assert "no label holds class 'x' (values [7])" in refused(tmp_path, labels={"tumour": [1, 4], "x": 7})
    assert "belongs to both" in refused(tmp_path, labels={"tumour": [1, 4], "x": 4})
    root = nnunet(tmp_path / "n")
    write_pair(root, names=("imagesTr/M_0_0000.nii.gz", "labelsTr/M_0.nii.gz"), value=3)
    assert "M_0.nii.gz holds 3 (" in refused(root) and "classes have the values [1]" in refused(root)
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 2}}
    assert "choose disjoint ones with data.labels" in refused(nnunet(root, about=regions))


def test_empty_labels(tmp_path: Path) -> None:
    for name in "ab":
        _, label = write_pair(tmp_path / name)
        image = nib.load(label)
        nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), label)
    assert "all 2 cases are empty" in refused(tmp_path)
    write_pair(tmp_path / "c", value=255)
    notes = load(tmp_path).cases.notes
    assert any("2 cases have an empty label" in note for note in notes)
    assert any("value 255 alone" in note for note in notes)


def test_a_second_check_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path / "a")
    first = load(tmp_path)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("read again")

    import tasks.meningioma.checking as checking

    real = checking.read_volume
    monkeypatch.setattr(checking, "read_volume", never)
    second = load(tmp_path)
    assert first.table.equals(second.table)
    monkeypatch.setattr(checking, "read_volume", real)
    write_pair(tmp_path / "a", seed=5, shape=(41, 44, 36))
    assert load(tmp_path).table["shape"][0] == "41 x 44 x 36"


def test_other_inputs(tmp_path: Path) -> None:
    assert "data.path is not set" in refused(None)
    assert "does not exist" in refused(tmp_path / "none")
    assert "holds no case" in refused(tmp_path)
    assert "has no dataset.json" in refused(tmp_path, format="nnunet")
    assert "'nnUnet' is not known. Did you mean 'nnunet'" in refused(tmp_path, format="nnUnet")
    assert "is no file" in refused(tmp_path, format="csv")
    (tmp_path / "dataset.json").write_text("[]")
    assert "no description of a data set" in refused(tmp_path)


def test_small_pieces() -> None:
    assert parse_labels({"background": 0, "b": [2, 3], "a": 1}, "x") == (("background", "b", "a"), ((2, 3), (1,)))
    for wrong in ({"a": 0}, {"a": "1"}, {"a": []}, {"background": 1, "a": 2}, {"background": 0}, {"a": True}):
        with pytest.raises(InputError):
            parse_labels(wrong, "x")
    labels = np.array([0, 1, 2, 3, 9], np.uint16)
    np.testing.assert_array_equal(as_classes(labels, ((2, 9), (300,))), [0, 0, 1, 0, 1])
    mask = np.zeros((9, 9, 9), bool)
    assert count_components(mask) == 0
    mask[1, 1, 1] = mask[2, 2, 2] = mask[5, 5, 5] = True
    assert count_components(mask) == 2


def test_real_cases_are_found(shared_data: Path) -> None:
    folder = shared_data / "nifti" / "tcga_lgg"
    checked = load(folder, label_name="seg_simple", labels={"tumour": [1, 2]}, image_names=["t1c"])
    assert checked.table["orientation"][0] == "LPS" and checked.table["tumour_ml"][0] == pytest.approx(24.188)
