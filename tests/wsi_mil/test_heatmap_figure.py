"""Figures show what they were given: the picture itself, its scale, its limits."""

import io
from itertools import pairwise

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tasks.wsi_mil.heatmap import overlay
from tasks.wsi_mil.heatmap_figure import (
    branch_figure,
    heatmap_figure,
    scale_bar_length,
    top_tiles,
    top_tiles_figure,
)


def texts(figure: Figure) -> list[str]:
    figure.canvas.draw()
    found = [figure.get_suptitle()]
    for ax in figure.axes:
        found += [ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), *(text.get_text() for text in ax.texts)]
    return [text for text in found if text]


@pytest.fixture
def thumbnail() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 91, 3), dtype=np.uint8)


@pytest.fixture
def heat() -> np.ndarray:
    values = np.random.default_rng(1).random((60, 91))
    values[:20] = np.nan
    return values


def test_the_slide_stands_beside_its_map_on_grey(thumbnail: np.ndarray, heat: np.ndarray) -> None:
    figure = heatmap_figure(thumbnail, heat, alpha=0.5, title="case 7", mpp=4.0)
    left, right = (np.asarray(ax.images[0].get_array()) for ax in figure.axes[:2])
    np.testing.assert_array_equal(left, thumbnail)
    grey = np.repeat(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY)[..., None], 3, -1)
    np.testing.assert_array_equal(right, overlay(grey, heat, alpha=0.5))
    assert {"case 7", "slide", "attention", "50 µm"} <= set(texts(figure))


def test_a_map_of_another_size_is_brought_to_the_thumbnail(thumbnail: np.ndarray) -> None:
    small = np.array([[0.0, np.nan], [np.nan, 1.0]])
    figure = heatmap_figure(thumbnail, small)
    picture = np.asarray(figure.axes[1].images[0].get_array()).astype(int)
    grey = np.ptp(picture, axis=-1) == 0
    assert not grey[:30, :45].any() and not grey[31:, 47:].any()
    assert grey[:29, 47:].all() and grey[31:, :45].all()


def test_no_scale_bar_is_drawn_when_the_resolution_is_unknown(thumbnail: np.ndarray, heat: np.ndarray) -> None:
    assert not any("µm" in text or "mm" in text for text in texts(heatmap_figure(thumbnail, heat)))


def test_the_known_region_is_outlined_and_does_not_widen_the_picture(thumbnail: np.ndarray, heat: np.ndarray) -> None:
    mask = np.zeros((30, 45))
    mask[10:20, 10:20] = 1
    figure = heatmap_figure(thumbnail, heat, mask=mask, mpp=2.0)
    plain = heatmap_figure(thumbnail, heat)
    for ax, without in zip(figure.axes[:2], plain.axes[:2], strict=True):
        assert len(ax.collections) == 1 and not without.collections
        assert ax.get_xlim() == without.get_xlim() and ax.get_ylim() == without.get_ylim()


def test_an_empty_or_full_region_has_no_outline(thumbnail: np.ndarray, heat: np.ndarray) -> None:
    for mask in (np.zeros((6, 9)), np.ones((6, 9))):
        assert not heatmap_figure(thumbnail, heat, mask=mask).axes[0].collections


@pytest.mark.parametrize("branches", [1, 2, 5])
def test_every_branch_gets_a_picture_and_its_name(thumbnail: np.ndarray, heat: np.ndarray, branches: int) -> None:
    heats = {f"branch {i + 1}": np.roll(heat, i, 1) for i in range(branches)}
    figure = branch_figure(thumbnail, heats, mode="nscaled", limits=(0, 3), mpp=0.5)
    found = texts(figure)
    assert set(heats) <= set(found) and any("uniform" in text for text in found)
    pictures = [np.asarray(ax.images[0].get_array()) for ax in figure.axes[:branches]]
    assert all((a != b).any() for a, b in pairwise(pictures))


@pytest.mark.parametrize(
    ("width", "expected"), [(4000, 1000), (3999, 500), (1, 0.2), (50_000, 10_000), (0.8, 0.2), (90, 20)]
)
def test_a_scale_bar_is_a_round_length_of_at_most_a_quarter(width: float, expected: float) -> None:
    assert scale_bar_length(width) == pytest.approx(expected)


def test_the_scale_bar_is_as_long_as_it_says(thumbnail: np.ndarray, heat: np.ndarray) -> None:
    figure = heatmap_figure(thumbnail, heat, mpp=4.0)
    (bar,) = figure.axes[0].patches
    assert bar.get_width() * 4.0 == pytest.approx(50)


def test_top_tiles_come_highest_first_and_ties_in_their_order() -> None:
    scores = np.array([0.1, 0.5, 0.9, 0.5, 0.2])
    assert top_tiles(scores, 3).tolist() == [2, 1, 3]
    assert top_tiles(scores, 99).tolist() == [2, 1, 3, 4, 0]


@pytest.mark.parametrize("count", [1, 5, 7])
def test_the_montage_shows_each_tile_with_its_caption(count: int) -> None:
    tiles = [np.full((8, 8, 3), 10 * i, np.uint8) for i in range(count)]
    figure = top_tiles_figure(tiles, [f"tile {i}" for i in range(count)], "highest")
    for i, ax in enumerate(figure.axes):
        np.testing.assert_array_equal(ax.images[0].get_array(), tiles[i])
        assert ax.get_xlabel() == f"tile {i}"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert Image.open(buffer).size[0] > 100
