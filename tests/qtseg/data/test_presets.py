"""The folders in which public data sets are handed out, made small."""

from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from kernels.errors import InputError
from tasks.qtseg.checking import check_set
from tasks.qtseg.data import ImageSet2D, folds_of
from tasks.qtseg.loading import Store, read_sample, read_second
from tasks.qtseg.preprocessing import Preprocessing
from tests.qtseg.data.files import blob, load, save, write_pairs

CROSSVAL = {"folds": 5, "test_fraction": 0.2, "repeats": 1, "val_fraction": 0.0, "splits": None, "only": None}


def checked(images: ImageSet2D) -> ImageSet2D:
    check_set(images, Store(Preprocessing((16, 16)), images.coding))
    return images


def sides(images: ImageSet2D) -> dict[str | None, list[str]]:
    found: dict[str | None, list[str]] = {}
    for sample in images.samples:
        found.setdefault(sample.split, []).append(sample.case_id)
    return found


def test_isic2016(tmp_path: Path) -> None:
    for word, names in (("Training", ["ISIC_0000000", "ISIC_0000001"]), ("Test", ["ISIC_0000003"])):
        base = f"ISBI2016_ISIC_Part1_{word}"
        write_pairs(tmp_path / "unpacked", names, f"{base}_Data", f"{base}_GroundTruth", "_Segmentation")
    images = checked(load(tmp_path, preset="isic2016"))
    assert sides(images) == {"train": ["ISIC_0000000", "ISIC_0000001"], "test": ["ISIC_0000003"]}
    assert images.classes == ("background", "lesion")
    assert "2 train images, where the published set has 900." in images.notes
    (tmp_path / "unpacked" / "ISBI2016_ISIC_Part1_Test_Data").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="lacks ISBI2016_ISIC_Part1_Test_Data"):
        load(tmp_path, preset="isic2016")


def test_busi_and_its_published_folds(tmp_path: Path) -> None:
    for word, count in (("benign", 12), ("malignant", 5), ("normal", 3)):
        write_pairs(tmp_path, [f"{word} ({i + 1})" for i in range(count)], word, word, "_mask")
    extra = np.zeros((20, 28), np.uint8)
    extra[0, 0] = 255
    save(tmp_path / "benign" / "benign (3)_mask_1.png", extra)
    images = checked(load(tmp_path, preset="busi"))
    assert len(images.samples) == 17
    double = next(s for s in images.samples if s.case_id == "benign (3)")
    assert len(double.masks) == 2 and double.stratum == "benign"
    assert read_sample(double, images.coding)[1][0, 0] == 1
    cfg = OmegaConf.create({"seed": 1, "crossval": {**CROSSVAL, "splits": "published"}})
    folds = folds_of(images, cfg)
    names = sorted(f"benign ({i + 1})" for i in range(12))  # as text: (1), (10), (11), (12), (2), ...
    assert folds[0].test == sorted([*names[:2], "malignant (1)"])
    tested = [i for fold in folds for i in fold.test]
    assert len(tested) == len(set(tested)) == 15 and not {*names[10:]} & {*tested}
    assert all(len(fold.train) == 14 for fold in folds)
    cfg.crossval.val_fraction = 0.2
    assert all(fold.val and not set(fold.val) & set(fold.train) for fold in folds_of(images, cfg))
    proper = folds_of(images, OmegaConf.create({"seed": 1, "crossval": CROSSVAL}))
    assert sorted(i for fold in proper for i in fold.test) == sorted(s.case_id for s in images.samples)
    assert all(sum("malignant" in i for i in fold.test) == 1 for fold in proper)


@pytest.mark.parametrize("nested", [True, False])
def test_bkai_in_two_and_three_classes(nested: bool, tmp_path: Path) -> None:
    table = np.array([[0, 0, 0], [0, 255, 0], [255, 0, 0]], np.uint8)
    for index in range(2):
        classes = np.kron(np.array([[0, 1], [2, 0]]), np.ones((16, 16), int))
        for name, array in (("train", blob(index, (32, 32))[0]), ("train_gt", table[classes])):
            folder = tmp_path / name / name if nested else tmp_path / name
            save(folder / f"id{index}.jpeg", array, quality=92)
    one = checked(load(tmp_path, preset="bkai"))
    assert one.classes == ("background", "polyp") and [s.case_id for s in one.samples] == ["id0", "id1"]
    both = checked(load(tmp_path, preset="bkai", polyps="both"))
    label = read_sample(both.samples[0], both.coding)[1]
    assert label[4, 28] == 1 and label[28, 4] == 2 and label[4, 4] == 0
    with pytest.raises(InputError, match=r"data.polyps=three"):
        load(tmp_path, preset="bkai", polyps="three")


def test_dsb2018_merges_nuclei(tmp_path: Path) -> None:
    for case in ("aa", "bb"):
        image, _ = blob(1)
        save(tmp_path / "stage1_train" / case / "images" / f"{case}.png", np.dstack([image, image[..., 0] * 0 + 255]))
        for index in range(3):
            mask = np.zeros((20, 28), np.uint8)
            mask[index * 5 : index * 5 + 3, :4] = 255
            save(tmp_path / "stage1_train" / case / "masks" / f"{index}.png", mask)
    images = checked(load(tmp_path, preset="dsb2018"))
    assert [s.case_id for s in images.samples] == ["aa", "bb"] and len(images.samples[0].masks) == 3
    image, label, _ = read_sample(images.samples[0], images.coding)
    assert image.shape == (20, 28, 3) and label.sum() == 36
    (tmp_path / "stage1_train" / "aa" / "images" / "aa.png").unlink()
    with pytest.raises(InputError, match="holds 0 images and 3 masks"):
        load(tmp_path, preset="dsb2018")


def test_fives_keeps_the_disease(tmp_path: Path) -> None:
    for side, names in (("train", ["1_A", "2_D"]), ("test", ["1_A"])):
        write_pairs(tmp_path / "FIVES" / side, names, "Original", "Ground truth")
    images = checked(load(tmp_path, preset="fives"))
    assert sides(images) == {"test": ["test_1_A"], "train": ["train_1_A", "train_2_D"]}
    assert [s.stratum for s in images.samples] == ["A", "A", "D"]


def write_drive(root: Path) -> None:
    for side, number in (("training", 21), ("training", 22), ("test", 1)):
        image, mask = blob(number)
        name = f"{number:02d}"
        save(root / side / "images" / f"{name}_{side}.tif", image)
        save(root / side / "1st_manual" / f"{name}_manual1.gif", mask)
        save(root / side / "mask" / f"{name}_{side}_mask.gif", np.full((20, 28), 255, np.uint8))
        if side == "test":
            save(root / side / "2nd_manual" / f"{name}_manual2.gif", 255 - mask)


def test_drive_has_fields_of_view_and_a_second_reader(tmp_path: Path) -> None:
    write_drive(tmp_path)
    images = checked(load(tmp_path, preset="drive"))
    assert sides(images) == {"test": ["01_test"], "train": ["21_training", "22_training"]}
    test = images.samples[0]
    _, label, fov = read_sample(test, images.coding)
    second = read_second(test, images.coding)
    assert fov is not None and fov.all() and second is not None
    np.testing.assert_array_equal(second, 1 - label)
    assert read_second(images.samples[1], images.coding) is None
    (tmp_path / "test" / "mask" / "01_test_mask.gif").unlink()
    with pytest.raises(InputError, match="no partner in"):
        load(tmp_path, preset="drive")
    (tmp_path / "test" / "1st_manual").rename(tmp_path / "gone")
    with pytest.raises(InputError, match="no folder 1st_manual"):
        load(tmp_path, preset="drive")


def test_chase_keeps_children_on_one_side(tmp_path: Path) -> None:
    for child in (1, 10, 11, 14):
        for eye in "LR":
            image, mask = blob(child)
            name = f"Image_{child:02d}{eye}"
            save(tmp_path / f"{name}.jpg", image)
            save(tmp_path / f"{name}_1stHO.png", mask)
            save(tmp_path / f"{name}_2ndHO.png", mask)
    images = checked(load(tmp_path, preset="chase"))
    assert sides(images)["test"] == ["Image_11L", "Image_11R", "Image_14L", "Image_14R"]
    assert images.samples[0].patient == images.samples[1].patient == "child_01"
    assert all(len(s.second) == 1 for s in images.samples)


@pytest.mark.parametrize("preset", ["isic2016", "busi", "bkai", "dsb2018", "fives", "drive", "chase"])
def test_every_preset_takes_plain_folders_too(preset: str, tmp_path: Path) -> None:
    for side in ("train", "test"):
        write_pairs(tmp_path / side, ["x", "y"], "inputs", "targets")
    assert len(load(tmp_path, preset=preset).samples) == 4
    (tmp_path / "a.csv").write_text("image,mask\n")
    with pytest.raises(InputError, match=r"a CSV goes with data.preset=folders"):
        load(tmp_path / "a.csv", preset=preset)


def test_the_real_drive(shared_data: Path) -> None:
    images = load(shared_data / "seg2d" / "drive", preset="drive")
    assert not images.notes and len(images.samples) == 40
    store = Store(Preprocessing((96, 96)), images.coding)
    found = check_set(images, store)
    assert found.shares()[1] == pytest.approx(0.087, abs=0.002)
    assert all(store.get(s).fov is not None for s in images.samples)


@pytest.mark.parametrize("name", ["kvasir_seg", "busi_malignant", "lgg_mri_2d"])
def test_real_samples(name: str, shared_data: Path) -> None:
    images = load(shared_data / "seg2d" / "samples" / name)
    assert len(images.samples) == 22
    found = check_set(images, Store(Preprocessing((64, 64)), images.coding))
    assert 0.02 < found.shares()[1] < 0.4
    assert bool(found.notes) == (name != "busi_malignant")
