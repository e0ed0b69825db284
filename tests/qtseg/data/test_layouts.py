"""Which files belong together, in folders and tables, and everything that is wrong with them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from kernels.errors import InputError
from tasks.qtseg.data import folds_of
from tests.qtseg.data.files import blob, load, save, write_pairs

CROSSVAL = {"folds": 3, "test_fraction": 0.25, "repeats": 1, "val_fraction": 0.2, "splits": None, "only": None}


def folds(images: Any, **options: Any) -> Any:
    return folds_of(images, OmegaConf.create({"seed": 1, "crossval": {**CROSSVAL, **options}}))


@pytest.mark.parametrize(
    ("images", "masks", "ending"),
    [
        ("images", "masks", ""),
        ("Images", "Labels", "_mask"),
        ("inputs", "targets", "_Segmentation"),
        (".", ".", "_mask"),
        ("img", "gt", "-gt"),
        ("img", "gt", "_mask_1"),
    ],
)
def test_pairs_are_found_by_name(images: str, masks: str, ending: str, tmp_path: Path) -> None:
    write_pairs(tmp_path, ["a_1", "b (2)", "c"], images, masks, ending)
    found = load(tmp_path)
    assert [sample.case_id for sample in found.samples] == ["a_1", "b (2)", "c"]
    assert found.samples[1].masks[0].stem == f"b (2){ending}"
    assert found.samples[0].patient == "a_1" and found.samples[0].split is None
    assert found.classes == ("background", "foreground")


def test_masks_with_numbers_belong_to_one_image(tmp_path: Path) -> None:
    write_pairs(tmp_path, ["a", "b"], ".", ".", "_mask")
    save(tmp_path / "a_mask_1.png", blob(5)[1])
    assert [len(sample.masks) for sample in load(tmp_path).samples] == [2, 1]


def test_a_suffix_may_be_given(tmp_path: Path) -> None:
    write_pairs(tmp_path, ["a", "b"], "images", "masks", "_lesion")
    with pytest.raises(InputError, match=r"2 images in .*images have no mask in .*masks"):
        load(tmp_path)
    assert len(load(tmp_path, mask_suffix="_lesion").samples) == 2


def test_folders_below_and_patients_in_the_path(tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        write_pairs(tmp_path, ["1", "2"], f"images/{patient}", f"masks/{patient}")
    found = load(tmp_path, patient_pattern=r"^(p\d)/")
    assert [(s.case_id, s.patient) for s in found.samples] == [
        ("p1_1", "p1"), ("p1_2", "p1"), ("p2_1", "p2"), ("p2_2", "p2")
    ]  # fmt: skip
    with pytest.raises(InputError, match="does not match the file"):
        load(tmp_path, patient_pattern="^(x)")
    with pytest.raises(InputError, match="no regular expression"):
        load(tmp_path, patient_pattern="(")


def test_train_val_and_test_folders_are_the_split(tmp_path: Path) -> None:
    for side in ("train", "valid", "test"):
        write_pairs(tmp_path / side, ["1", "2", "3"], "inputs", "targets")
    images = load(tmp_path)
    (fold,) = folds(images)
    assert fold.test == ["test_1", "test_2", "test_3"] and fold.val[0] == "val_1" and len(fold.train) == 3
    shutil.rmtree(tmp_path / "test")
    images = load(tmp_path)
    assert {s.split for s in images.samples} == {"train", "test"} and "no test folder" in images.notes[0]
    shutil.rmtree(tmp_path / "valid")
    with pytest.raises(InputError, match="neither test nor val"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda root: (root / "masks" / "a.png").unlink(), r"1 image in .*images has no mask in .*masks: 'a.png'"),
        (lambda root: (root / "images" / "a.png").unlink(), r"1 mask in .*masks has no image in"),
        (lambda root: shutil.rmtree(root / "masks"), "has a folder images but none called masks"),
        (lambda root: shutil.rmtree(root), "does not exist"),
        (lambda root: (root / "1st_manual").mkdir(), "set data.preset=drive"),
        (lambda root: (root / "labels").mkdir(), "any of which may hold the masks"),
        (lambda root: shutil.copy(root / "images" / "a.png", root / "images" / "a.bmp"), "two images of one name"),
        (lambda root: [p.unlink() for p in root.rglob("*.png")], "holds no image"),
    ],
)
def test_folders_that_are_no_set_are_one_sentence(change: Any, sentence: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "set", ["a", "b"])
    change(tmp_path / "set")
    with pytest.raises(InputError, match=sentence):
        load(tmp_path / "set")


def test_names_that_run_together_are_refused(tmp_path: Path) -> None:
    for below in ("a_b/c", "a/b_c"):
        write_pairs(tmp_path, [below])
    with pytest.raises(InputError, match="'a_b_c' name more than one image"):
        load(tmp_path)


def test_missing_options_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.path is not set"):
        load(None)
    with pytest.raises(InputError, match="Did you mean 'isic2016'"):
        load(tmp_path, preset="isic2017")
    with pytest.raises(InputError, match="is no CSV"):
        load(save(tmp_path / "a.png", blob(0)[0]))


def table(root: Path, header: str, *rows: str) -> Path:
    path = root / "images.csv"
    path.write_text("\n".join([header, *rows]))
    return path


def test_a_table_names_everything(tmp_path: Path) -> None:
    write_pairs(tmp_path, ["a", "b", "c"])
    save(tmp_path / "masks" / "a2.png", blob(9)[1])
    path = table(
        tmp_path,
        "Image,Mask,Patient,Split,fov,id",
        "images/a.png,masks/a.png,p1,train,masks/b.png,first",
        "images/a.png,masks/a2.png,p1,train,masks/b.png,first",
        "images/b.png,masks/b.png|masks/c.png,p2,training,,",
        "images/c.png,masks/c.png,p3,test,,",
    )
    first, second, third = sorted(load(path).samples, key=lambda s: s.patient)
    assert (first.case_id, first.patient, first.split, len(first.masks)) == ("first", "p1", "train", 2)
    assert first.fov == tmp_path / "masks" / "b.png" and second.fov is None
    assert second.case_id == "images_b" and len(second.masks) == 2 and third.split == "test"
    (fold,) = folds(load(path), val_fraction=0.0)
    assert fold.train == ["first", "images_b"] and fold.test == ["images_c"]


@pytest.mark.parametrize("spelling", ["../outside.png", "/etc/hostname", "images/../../outside.png"])
def test_paths_that_lead_out_of_the_folder_are_refused(spelling: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "set", ["a"])
    save(tmp_path / "outside.png", blob(0)[0])
    for row in (f"{spelling},masks/a.png", f"images/a.png,{spelling}"):
        with pytest.raises(InputError, match=r"row 2: .* lies outside"):
            load(table(tmp_path / "set", "image,mask", row))


def test_all_faults_of_a_table_are_told_together(tmp_path: Path) -> None:
    write_pairs(tmp_path, ["a", "b"])
    path = table(
        tmp_path,
        "image,mask,id,split",
        "images/a.png,masks/a.png,x,train",
        "images/b.png,masks/b.png,x,test",
        "images/a.png,masks/a.png,x,train",
        "gone.png,masks/a.png,,train",
        "images/a.png,,,train",
        "images/b.png,masks/b.png,a/b,train",
        "images/b.png,masks/b.png,y,sideways",
    )
    with pytest.raises(InputError) as caught:
        load(path)
    for part in (
        "6 problems",
        "row 3: id 'x' is that of a.png too",
        "row 4 repeats",
        "row 5: there is no file 'gone.png'",
        "row 6 has no image or no mask",
        "row 7: id 'a/b' cannot be used",
        "row 8: split 'sideways'",
    ):
        assert part in str(caught.value), part


def test_a_patient_on_two_sides_and_half_a_split_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path, ["a", "b"])
    rows = "images/a.png,masks/a.png,p,{}", "images/b.png,masks/b.png,p,{}"
    with pytest.raises(InputError, match="patient 'p' is in test and train"):
        load(table(tmp_path, "image,mask,patient,split", rows[0].format("train"), rows[1].format("test")))
    with pytest.raises(InputError, match="for some images only"):
        load(table(tmp_path, "image,mask,patient,split", rows[0].format("train"), rows[1].format("")))
    with pytest.raises(InputError, match="no column 'mask'"):
        load(table(tmp_path, "image,masks", "images/a.png,masks/a.png"))


def test_folds_keep_patients_together_and_strata_even(tmp_path: Path) -> None:
    write_pairs(tmp_path, [f"{i:02d}" for i in range(24)])
    rows = [f"images/{i:02d}.png,masks/{i:02d}.png,p{i // 2},{'ab'[i // 2 % 2]}" for i in range(24)]
    images = load(table(tmp_path, "image,mask,patient,stratum", *rows))
    owner = {s.case_id: (s.patient, s.stratum) for s in images.samples}
    found = folds(images)
    assert sorted(i for fold in found for i in fold.test) == sorted(owner)
    for fold in found:
        sides = [{owner[i][0] for i in side} for side in (fold.train, fold.val, fold.test)]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
        assert sum(owner[i][1] == "a" for i in fold.test) == 4 and len(fold.test) == 8
    with pytest.raises(InputError, match="no folds were published"):
        folds(images, splits="published")


def test_the_fingerprint_changes_with_the_data(tmp_path: Path) -> None:
    write_pairs(tmp_path, ["a", "b"])
    before = load(tmp_path).fingerprint()
    assert load(tmp_path).fingerprint() == before
    assert load(tmp_path, labels={"x": 255}).fingerprint() != before
    save(tmp_path / "masks" / "a.png", blob(0, (40, 40))[1])
    assert load(tmp_path).fingerprint() != before
