"""From the numbers in a mask to classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kernels.errors import InputError
from tasks.common.images import MaskPixels
from tasks.qtseg.masks import MaskCoding, coding_of, read_labels
from tests.qtseg.data.files import save

HERE = Path("mask.png")
CLASSES = np.array([[0, 1, 2], [2, 0, 1]], np.uint8)


def decode(coding: MaskCoding, array: np.ndarray, **options: Any) -> np.ndarray:
    return coding.decode(MaskPixels(array, **options), HERE)


@pytest.mark.parametrize("value", [1, 7, 255, 65535])
def test_black_and_one_other_value_are_two_classes(value: int) -> None:
    array = (CLASSES > 0).astype(np.uint16) * np.uint16(value)
    np.testing.assert_array_equal(decode(MaskCoding(), array), CLASSES > 0)
    assert not decode(MaskCoding(), np.zeros((3, 4), np.uint8)).any()
    assert decode(MaskCoding(), np.full((3, 4), value, np.uint16)).all()


def test_one_colour_on_black_is_the_foreground() -> None:
    array = (CLASSES > 0)[..., None] * np.array([255, 0, 128], np.uint8)
    np.testing.assert_array_equal(decode(MaskCoding(), array), CLASSES > 0)


def test_other_values_are_shown_with_their_counts() -> None:
    with pytest.raises(InputError, match=r"mask.png is not black .*0: 2 pixels, 1: 2 pixels, 2: 2 pixels.*data.labels"):
        decode(MaskCoding(), CLASSES)
    np.testing.assert_array_equal(decode(MaskCoding(threshold=1), CLASSES), CLASSES == 2)
    np.testing.assert_array_equal(decode(MaskCoding(threshold=0), CLASSES), CLASSES > 0)
    with pytest.raises(InputError, match=r"\[9, 0, 0\]: 1 pixels"):
        decode(coding_of({"a": [1, 2, 3]}, None), np.array([[[0, 0, 0], [9, 0, 0]]], np.uint8))
    with pytest.raises(InputError, match=r"does not name .5: 1 pixels"):
        decode(coding_of({"a": 3}, None), np.array([[0, 5, 3]], np.uint8))


def test_greys_and_colours_are_named() -> None:
    greys = coding_of({"polyp": 128, "wall": 3}, None)
    assert greys.classes == ("background", "polyp", "wall")
    np.testing.assert_array_equal(decode(greys, np.array([0, 128, 3], np.uint8)[CLASSES]), CLASSES)
    colours = coding_of({"background": [255, 255, 255], "a": [255, 0, 0], "b": [0, 0, 255]}, None)
    table = np.array([[255, 255, 255], [255, 0, 0], [0, 0, 255]], np.uint8)
    np.testing.assert_array_equal(decode(colours, table[CLASSES]), CLASSES)
    np.testing.assert_array_equal(decode(colours, CLASSES, colours=table[CLASSES]), CLASSES)
    with pytest.raises(InputError, match="is in colour"):
        decode(greys, table[CLASSES])


def test_jpeg_gets_the_nearest_class(tmp_path: Path) -> None:
    large = np.kron(CLASSES, np.ones((24, 24), np.uint8))
    table = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)
    for coding, array in (
        (coding_of({"a": 120, "b": 255}, None), np.array([0, 120, 255], np.uint8)[large]),
        (coding_of({"a": [255, 0, 0], "b": [0, 255, 0]}, None), table[large]),
        (MaskCoding("hues", ("background", "b", "a")), table[large]),
    ):
        found = read_labels((save(tmp_path / "a.jpg", array, quality=90),), coding)
        wanted = large if coding.kind != "hues" else np.array([0, 2, 1])[large]
        assert (found != wanted).mean() < 0.04
    path = save(tmp_path / "b.jpg", (large > 0).astype(np.uint8) * 255)
    assert (read_labels((path,), MaskCoding()) != (large > 0)).mean() < 0.02


def test_neopolyp_is_green_one_red_two_or_both_one() -> None:
    table = np.array([[3, 1, 2], [30, 240, 40], [230, 20, 30]], np.uint8)
    three, two = MaskCoding("hues", ("background", "n", "m")), MaskCoding("hues", ("background", "polyp"))
    np.testing.assert_array_equal(decode(three, table[CLASSES], lossy=True), CLASSES)
    np.testing.assert_array_equal(decode(two, table[CLASSES]), CLASSES > 0)
    np.testing.assert_array_equal(decode(three, CLASSES), CLASSES)  # class indices, as arrays hold them
    assert not decode(three, np.full((4, 4), 2, np.uint8), lossy=True).any()
    with pytest.raises(InputError, match="no colours"):
        decode(three, np.full((4, 4), 200, np.uint8))


def test_masks_of_one_image_are_merged(tmp_path: Path) -> None:
    first, second = np.zeros((2, 4, 5), np.uint8)
    first[0, 0], second[3, 4] = 255, 255
    paths = save(tmp_path / "a.png", first), save(tmp_path / "b.png", second)
    np.testing.assert_array_equal(read_labels(paths, MaskCoding()), (first | second) > 0)
    save(tmp_path / "b.png", np.zeros((4, 6), np.uint8))
    with pytest.raises(InputError, match=r"b.png is 6 x 4, but a.png, a mask of the same image, 5 x 4"):
        read_labels(paths, MaskCoding())


@pytest.mark.parametrize(
    ("labels", "threshold", "sentence"),
    [
        ({"a": "red"}, None, "must be a grey level"),
        ({"a": [1, 2]}, None, "must be a grey level"),
        ({"a": 70000}, None, "must be a grey level"),
        ({"a": True}, None, "must be a grey level"),
        ({"a": 1, "b": [1, 2, 3]}, None, "mixes"),
        ({"a": 1, "b": 1}, None, "two classes one value"),
        ({"a": 0}, None, "two classes one value"),
        ({"background": 0}, None, "no class but the background"),
        ({"a": 1}, 3, "exclude each other"),
        (None, -1, "data.threshold=-1"),
    ],
)
def test_labels_that_cannot_be_are_one_sentence(labels: Any, threshold: int | None, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        coding_of(labels, threshold)


def test_a_palette_of_one_colour_works_as_two_classes(tmp_path: Path) -> None:
    picture = Image.fromarray((CLASSES > 0).astype(np.uint8)).convert("P")
    picture.putpalette([0, 0, 0, 250, 10, 10])
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_labels((tmp_path / "a.png",), MaskCoding()), CLASSES > 0)
