"""The made images are the same every time, difficult enough, and read like any others."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from kernels.errors import InputError
from tasks.qtseg import bench_data
from tasks.qtseg.checking import check_set
from tasks.qtseg.data import ImageSet2D, folds_of
from tasks.qtseg.demo import class_name, make_images
from tasks.qtseg.demo.baseline import dice_of_rules, histograms, otsu, threshold_baseline
from tasks.qtseg.demo.make import paint
from tasks.qtseg.loading import Store
from tasks.qtseg.preprocessing import Preprocessing
from tests.qtseg.data.files import load

CROSSVAL = {"folds": 4, "test_fraction": 0.25, "repeats": 1, "val_fraction": 0.0, "splits": None, "only": None}


def folds(images: ImageSet2D) -> Any:
    return folds_of(images, OmegaConf.create({"seed": 1, "crossval": CROSSVAL}))


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("lesions", 0.03, 0.6), ("nuclei", 0.03, 0.7), ("vessels", 0.04, 0.25)]
)
def test_pictures_follow_from_their_number(kind: str, low: float, high: float) -> None:
    first, again, other = paint(kind, 4, 96), paint(kind, 4, 96), paint(kind, 6, 96)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, other.image)
    assert first.image.shape == (96, 96, 3) and set(np.unique(first.mask)) == {0, 255}
    assert all(low < (paint(kind, i, 64).mask > 0).mean() < high for i in range(12))
    if kind == "vessels":
        assert first.fov is not None and not (first.mask[first.fov == 0]).any()


def test_a_set_is_made_once_and_read_like_any_other(tmp_path: Path) -> None:
    table = make_images(tmp_path / "set", "mix", 12, 64)
    stamp = (tmp_path / "set" / "images").stat().st_mtime_ns
    assert make_images(tmp_path / "set", "mix", 12, 64) == table
    assert (tmp_path / "set" / "images").stat().st_mtime_ns == stamp
    images = load(table)
    found = check_set(images, Store(Preprocessing((64, 64)), images.coding))
    assert len(images.samples) == 12 and not found.notes
    assert load(table, labels={class_name("mix"): 255}).classes == ("background", "structure")
    assert class_name("nuclei") == "nucleus"
    assert {s.stratum for s in images.samples} == {"lesions", "nuclei", "vessels"}
    assert len({s.patient for s in images.samples}) == 6 and all(s.fov for s in images.samples)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "lesion"}, "Did you mean 'lesions'"),
        ({"count": 3}, "8 images are needed"),
        ({"side": 9}, "must be 48 to 1024"),
    ],
)
def test_a_set_that_cannot_be_made_is_one_sentence(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        make_images(tmp_path / "set", **options)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("")
    with pytest.raises(InputError, match="holds other files"):
        make_images(tmp_path / "set")


def test_a_threshold_is_better_than_nothing_and_not_good_enough(tmp_path: Path) -> None:
    for kind, least, most in (("lesions", 0.4, 0.85), ("nuclei", 0.35, 0.85), ("vessels", 0.2, 0.6)):
        images = load(make_images(tmp_path / kind, kind, 24, 64))
        found = threshold_baseline(images, folds(images))
        assert least < found["dice"] < most, (kind, found["dice"])
        assert len(found["cases"]) == 24 and len(found["rules"]) == 4
        shutil.rmtree(tmp_path / kind)


def test_dice_of_rules_is_that_of_the_masks(tmp_path: Path) -> None:
    images = load(make_images(tmp_path / "set", "lesions", 8, 48))
    foreground, everything = histograms(images)
    dice = dice_of_rules(foreground, everything)
    assert dice.shape == (8, 2, 9, 257)
    picture = paint("lesions", 0, 48)
    red, mask = picture.image[..., 0], picture.mask > 0
    for side, pred in enumerate((red > 120, red <= 120)):
        assert dice[0, side, 0, 120] == pytest.approx(2 * (pred & mask).sum() / (pred.sum() + mask.sum()))
    level = int(otsu(everything[0, 0]))
    assert dice[0, 1, 0, 256] == dice[0, 1, 0, level]
    values = red.ravel().astype(float)
    best = max(
        range(256),
        key=lambda t: (
            0.0
            if (values <= t).all() or (values > t).all()
            else (values <= t).mean()
            * (values > t).mean()
            * (values[values <= t].mean() - values[values > t].mean()) ** 2
        ),
    )
    assert level == best


def test_an_empty_mask_is_right_when_nothing_is_found() -> None:
    everything = np.zeros((1, 9, 256), np.int64)
    everything[..., 10] = 50
    dice = dice_of_rules(np.zeros_like(everything), everything)
    assert (dice[0, 0, :, 10:256] == 1).all() and not dice[0, 0, :, :10].any()


def test_the_pipeline_can_be_timed(tmp_path: Path) -> None:
    images = load(make_images(tmp_path / "set", "lesions", 8, 48))
    (row,) = bench_data.throughput(images, (32,), repeats=1)
    assert row.ours > 0 and row.peer > 0 and row.unit == "images/s"
    assert bench_data.one_resampling(24, 1).unit == "images/s"
