"""Which images are found, how they are split, and everything that is wrong with a set at once."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from kernels.errors import InputError
from tasks.classification.data import ImageSet, load_images, refuse_rare
from tasks.classification.loading import ImageDataset, Images, Preprocessing, check_images, make_loader
from tasks.classification.train import folds_of
from tasks.common.samplers import EpochSampler
from tests.classification.pictures import write_set

DEFAULTS = {
    "path": None,
    "label_column": "label",
    "patient_column": "patient",
    "patient_pattern": None,
    "classes": None,
}
CROSSVAL = {"folds": 3, "test_fraction": 0.25, "repeats": 1, "val_fraction": 0.2, "splits": None, "only": None}


def load(path: Path | None, **options: Any) -> ImageSet:
    return load_images(OmegaConf.create({**DEFAULTS, "path": None if path is None else str(path), **options}))


def folds(images: ImageSet, **options: Any) -> list[Any]:
    return folds_of(images, OmegaConf.create({"seed": 1, "crossval": {**CROSSVAL, **options}}))


def test_folders_name_the_classes(tmp_path: Path) -> None:
    write_set(tmp_path, 12, classes=3)
    (tmp_path / "across" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    images = load(tmp_path)
    assert images.classes == ("across", "down", "plain")
    assert len(images.samples) == 12
    assert images.samples[0].case_id == "across/000.png"
    assert images.kind == "multiclass"
    assert load(tmp_path, classes=["plain", "down"]).kind == "binary"


def test_a_pattern_finds_the_patient_in_the_name(tmp_path: Path) -> None:
    write_set(tmp_path, 12)
    images = load(tmp_path, patient_pattern=r"^(\d\d)")
    assert {sample.patient for sample in images.samples} == {"00", "01"}
    with pytest.raises(InputError, match="does not match the file name"):
        load(tmp_path, patient_pattern="^(x+)")


def test_train_val_and_test_folders_are_the_split(tmp_path: Path) -> None:
    for number, side in enumerate(("train", "valid", "test")):
        write_set(tmp_path / side, 8, seed=number)
    images = load(tmp_path)
    (fold,) = folds(images)
    assert [len(side) for side in (fold.train, fold.val, fold.test)] == [8, 8, 8]
    assert all(case.startswith("test/") for case in fold.test)
    shutil.rmtree(tmp_path / "test")
    images = load(tmp_path)
    (fold,) = folds(images)
    assert all(case.startswith("valid/") for case in fold.test)
    assert fold.val and all(case.startswith("train/") for case in fold.val)
    assert "no test folder" in images.notes[0]


def test_a_table_names_paths_labels_patients_and_splits(tmp_path: Path) -> None:
    table = write_set(tmp_path, 12)
    assert len({sample.patient for sample in load(table).samples}) == 6
    lines = table.read_text().splitlines()
    split = ["split", *["train"] * 8, *["test"] * 4]
    table.write_text("\n".join(f"{line},{side}" for line, side in zip(lines, split, strict=True)))
    (fold,) = folds(load(table), val_fraction=0.0)
    assert len(fold.train) == 8 and len(fold.test) == 4


@pytest.mark.parametrize("spelling", ["../outside.png", "/etc/hostname", "across/../../outside.png"])
def test_paths_that_lead_out_of_the_folder_are_refused(spelling: str, tmp_path: Path) -> None:
    table = write_set(tmp_path / "set", 4)
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    table.write_text(table.read_text() + f"{spelling},across,p9\n")
    with pytest.raises(InputError, match=r"row 6: .* lies outside"):
        load(table)


def test_all_faults_of_a_table_are_told_together(tmp_path: Path) -> None:
    table = write_set(tmp_path, 4)
    table.write_text(table.read_text() + "gone.png,across,p9\nacross/000.png,,p9\nacross/000.png,across,p9\n")
    with pytest.raises(InputError) as caught:
        load(table)
    message = str(caught.value)
    assert message.startswith("3 problems")
    for part in ("row 6: there is no file 'gone.png'", "row 7 has no path or no label", "more than once"):
        assert part in message


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda root: shutil.rmtree(root / "down"), "holds one class only"),
        (lambda root: [p.unlink() for p in (root / "down").iterdir()], "holds no image"),
        (lambda root: shutil.rmtree(root), "does not exist"),
        (lambda root: (root / "across").rename(root / "train"), "holds 'down' beside train"),
    ],
)
def test_folders_that_are_no_set_are_one_sentence(change: Any, sentence: str, tmp_path: Path) -> None:
    write_set(tmp_path / "set", 4)
    change(tmp_path / "set")
    with pytest.raises(InputError, match=sentence):
        load(tmp_path / "set")


def test_rare_classes_are_named(tmp_path: Path) -> None:
    write_set(tmp_path, 14, classes=3)
    for path in sorted((tmp_path / "plain").iterdir())[1:]:
        path.unlink()
    assert refuse_rare(load(tmp_path), 2) == ["class 'plain' has 1 image; 2 are needed at least."]
    assert len(refuse_rare(load(tmp_path), 7)) == 3
    one_owner = load(tmp_path, patient_pattern="^0")
    assert "comes from one patient" in refuse_rare(one_owner, 2)[0]


def test_no_patient_is_on_two_sides_and_classes_are_even(tmp_path: Path) -> None:
    images = load(write_set(tmp_path, 48))
    owner = {sample.case_id: sample.patient for sample in images.samples}
    found = folds(images)
    assert len(found) == 3
    assert sorted(case for fold in found for case in fold.test) == sorted(owner)
    for fold in found:
        sides = [{owner[case] for case in side} for side in (fold.train, fold.val, fold.test)]
        assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
        assert np.bincount(images.labels(images.select(fold.test))).tolist() == [8, 8]


def test_patients_with_images_of_several_classes_are_dealt_out_whole(tmp_path: Path) -> None:
    table = write_set(tmp_path, 48, classes=3)
    lines = table.read_text().splitlines()
    table.write_text(
        "\n".join([lines[0], *(f"{line.rpartition(',')[0]},q{i % 9}" for i, line in enumerate(lines[1:]))])
    )
    images = load(table)
    for fold in folds(images, folds=4):
        assert set(images.labels(images.select(fold.test))) == {0, 1, 2}
        owners = [{s.patient for s in images.select(side)} for side in (fold.train, fold.test)]
        assert not owners[0] & owners[1]


def test_one_fold_is_a_single_split(tmp_path: Path) -> None:
    images = load(write_set(tmp_path, 48))
    (fold,) = folds(images, folds=1)
    assert len(fold.test) == 12
    assert [f.repeat for f in folds(images, folds=1, repeats=3)] == [0, 1, 2]
    with pytest.raises(InputError, match="test_fraction"):
        folds(images, folds=1, test_fraction=0.0)


def test_copies_under_two_labels_are_noted_and_damaged_files_collected(tmp_path: Path) -> None:
    write_set(tmp_path, 8)
    shutil.copy(tmp_path / "across" / "000.png", tmp_path / "down" / "copy.png")
    (tmp_path / "down" / "empty.png").write_bytes(b"")
    (tmp_path / "down" / "text.png").write_text("no image")
    images = load(tmp_path)
    checked = check_images(images.samples, Images(None))
    assert len(checked.problems) == 2
    assert "1 images exist more than once under different labels" in checked.notes[0]
    assert len(checked.colours) == 9
    assert all(
        colour.shape == (3,) and (colour > 0).all() and (colour < 1).all() for colour in checked.colours.values()
    )


def batches(images: ImageSet, store: Images, epoch: int, workers: int) -> list[torch.Tensor]:
    augment = OmegaConf.create(
        {"scale": [0.3, 1.0], "ratio": [0.75, 1.3333], "hflip": 0.5, "vflip": 0.5, "color_jitter": 0.4,
         "auto_augment": "rand-m9-mstd0.5", "random_erasing": 0.5, "erasing_mode": "pixel"}
    )  # fmt: skip
    dataset = ImageDataset(images.samples, store, Preprocessing(16, (0.5,) * 3, (0.5,) * 3).augmentation(augment))
    sampler = EpochSampler(len(dataset), 3)
    sampler.current_epoch = lambda: epoch
    return [batch.images for batch in make_loader(dataset, 4, sampler, workers)]


def test_augmentation_follows_from_seed_and_epoch_whoever_reads(tmp_path: Path) -> None:
    images, store = load(write_set(tmp_path, 9)), Images(None)
    first = batches(images, store, epoch=2, workers=0)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    again = batches(images, store, epoch=2, workers=1)
    assert [len(batch) for batch in first] == [4, 4]  # a single image is no batch
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], batches(images, store, epoch=3, workers=0)[0])


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_images_of_any_size_become_squares(crop_mode: str) -> None:
    transform = Preprocessing(24, (0.5,) * 3, (0.5,) * 3, crop_mode).transform()
    for size in ((1, 1), (7, 90), (300, 20)):
        assert transform(Image.new("RGB", size)).shape == (3, 24, 24)
