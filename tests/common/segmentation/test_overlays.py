"""Outlines and errors are drawn where they are, in the colours of their classes, and the image is left alone."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from kernels.errors import InputError
from tasks.common.plots import class_colour, png_bytes
from tasks.common.segmentation import overlays
from tasks.common.segmentation.overlays import (
    comparison_overlay,
    error_overlay,
    outline_overlay,
    picture_of,
    segmentation_figure,
)


def colour(name: str) -> list[int]:
    return [round(255 * part) for part in to_rgb(name)]


def near(picture: NDArray, name: str, tolerance: int = 40) -> NDArray[np.bool_]:
    return (np.abs(picture.astype(int) - colour(name)) < tolerance).all(axis=2)


@pytest.mark.parametrize(
    "image",
    [
        np.full((5, 7), 90, np.uint8),
        np.full((5, 7, 1), 90, np.uint8),
        np.full((5, 7, 3), 90, np.uint8),
        np.full((5, 7, 4), 90, np.uint8),
    ],
)
def test_bytes_are_shown_as_they_are(image: NDArray) -> None:
    assert picture_of(image).shape == (5, 7, 3)
    assert (picture_of(image) == 90).all()


def test_other_numbers_are_windowed_and_masks_are_black_and_white() -> None:
    ramp = np.linspace(500, 60000, 400).reshape(20, 20).astype(np.uint16)
    shown = picture_of(ramp)
    assert shown.min() == 0 and shown.max() == 255
    assert (np.diff(shown[..., 0].ravel().astype(int)) >= 0).all()
    assert np.unique(picture_of(np.eye(4, dtype=bool))).tolist() == [0, 255]
    holed = ramp.astype(np.float32)
    holed[3, 3] = np.nan
    assert picture_of(holed)[3, 3].tolist() == [0, 0, 0]
    assert np.isin(picture_of(np.zeros((4, 4), np.float32)), 0).all()


def test_class_outlines_lie_on_the_edges_of_the_class() -> None:
    image = np.zeros((64, 48), np.uint8)
    labels = np.zeros(image.shape, int)
    labels[10:30, 10:40] = 1
    labels[45:55, 5:15] = 3
    picture = outline_overlay(image, labels)
    assert picture.shape == (64 * 8, 48 * 8, 3) and (image == 0).all()
    for value, (top, bottom, left, right) in {1: (10, 30, 10, 40), 3: (45, 55, 5, 15)}.items():
        rows, columns = np.nonzero(near(picture, class_colour(value - 1), 20))
        edges = np.array([rows.min(), rows.max() + 1, columns.min(), columns.max() + 1])
        assert np.abs(edges - 8 * np.array([top, bottom, left, right])).max() <= 2
    assert (picture[20 * 8, 25 * 8] == 0).all()


def test_reference_and_prediction_are_told_apart() -> None:
    image = np.full((200, 200, 3), 20, np.uint8)
    reference, prediction = np.zeros((2, 200, 200), bool)
    reference[50:100, 50:100] = True
    prediction[120:160, 120:160] = True
    picture = comparison_overlay(image, reference, prediction, enlarge=1)
    assert picture.shape == image.shape
    assert near(picture, overlays.REFERENCE)[50, 60:90].all()
    assert near(picture, overlays.PREDICTION)[120, 130:150].all()
    assert not near(picture, overlays.PREDICTION)[:110, :110].any()


def test_errors_have_their_colours_and_nothing_is_judged_outside_the_field_of_view() -> None:
    image = np.full((40, 40), 100, np.uint8)
    truth, found = np.zeros((2, 40, 40), int)
    truth[5:20, 5:20] = 1
    found[5:20, 10:25] = 1
    truth[30:35, 30:35], found[30:35, 30:35] = 1, 2  # a wrong class
    region = np.ones((40, 40), bool)
    region[:, :7] = False
    picture = error_overlay(image, truth, found, opacity=1.0, enlarge=2, region=region)
    assert picture[20, 16].tolist() == colour(overlays.FALSE_NEGATIVE)
    assert picture[20, 30].tolist() == colour(overlays.AGREED)
    assert picture[20, 46].tolist() == colour(overlays.FALSE_POSITIVE)
    assert picture[64, 64].tolist() == colour(overlays.FALSE_POSITIVE)
    assert picture[20, 12].tolist() == [35, 35, 35] and picture[60, 40].tolist() == [100, 100, 100]


@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (41, 67)])
def test_any_size_is_drawn(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((*shape, 3)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 3, shape)
    for picture in (outline_overlay(image, labels), error_overlay(image, labels, labels.T.reshape(shape))):
        assert picture.dtype == np.uint8 and picture.shape[0] % shape[0] == 0 == picture.shape[1] % shape[1]


def test_figures_have_a_panel_for_each_side_and_a_legend() -> None:
    image = np.random.default_rng(0).integers(0, 255, (30, 45, 3), dtype=np.uint8)
    labels = np.zeros((30, 45), int)
    labels[4:9, 4:9] = 1
    single = segmentation_figure(image, labels > 0, labels, ["background", "polyp"], title="a.png")
    assert [axes.get_title() for axes in single.axes] == ["Image", "Outlines", "Errors"]
    labels[20:, 20:] = 2
    several = segmentation_figure(image, labels, labels.T.reshape(30, 45), ["background", "polyp", "vessel"])
    assert [axes.get_title() for axes in several.axes] == ["Image", "Reference", "Prediction", "Errors"]
    names = [text.get_text() for text in several.legends[0].get_texts()]
    assert names == ["polyp", "vessel", "Agreed", "False positive", "Missed"]
    alone = segmentation_figure(image, None, labels, ["background", "polyp", "vessel"])
    assert [axes.get_title() for axes in alone.axes] == ["Image", "Prediction"]
    assert png_bytes(alone, 50).startswith(b"\x89PNG")


def test_what_does_not_fit_is_refused() -> None:
    image, labels = np.zeros((6, 5), np.uint8), np.zeros((6, 5), int)
    with pytest.raises(InputError, match=r"labels have the shape \(5, 6\) and the image \(6, 5\)"):
        outline_overlay(image, labels.T)
    with pytest.raises(InputError, match="labels up to 4 need 5 class names"):
        segmentation_figure(image, None, labels + 4, ["background", "polyp"])
    with pytest.raises(InputError, match=r"shape \(6, 5, 2\) cannot be drawn"):
        picture_of(np.zeros((6, 5, 2)))
    with pytest.raises(InputError, match="enlarge=0"):
        outline_overlay(image, labels, enlarge=0)
