"""Outlines run along the pixels' edges: areas, holes and pieces are those of the mask, whatever its shape."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.ndimage import label

from kernels.errors import InputError
from tasks.common.contours import read_geojson, write_geojson
from tasks.common.mask_outlines import class_contours, mask_contours

masks = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(lambda shape: arrays(np.bool_, shape))


def fill(rings: list[NDArray], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels inside an odd number of rings of whole-number corners: each upright edge flips what is right of it."""
    flips = np.zeros((shape[0], shape[1] + 1), int)
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring.tolist(), np.roll(ring, -1, axis=0).tolist(), strict=True):
            assert (x0 == x1) != (y0 == y1), "edges run along pixels"
            if x0 == x1:
                flips[min(y0, y1) : max(y0, y1), x0] += 1
    return np.cumsum(flips, axis=1)[:, :-1] % 2 == 1


@settings(max_examples=150, deadline=None)
@given(masks)
def test_filled_again_the_outlines_are_the_mask(mask: NDArray[np.bool_]) -> None:
    contours = mask_contours(mask)
    assert len(contours) == label(mask)[1]
    rings = [ring for c in contours for ring in (c.outline, *c.holes)]
    np.testing.assert_array_equal(fill(rings, mask.shape), mask)
    for contour in contours:
        assert fill([contour.outline, *contour.holes], mask.shape).sum() == pytest.approx(contour.area)


@settings(max_examples=150, deadline=None)
@given(masks)
def test_rings_are_simple_so_that_polygons_are_valid(mask: NDArray[np.bool_]) -> None:
    for contour in mask_contours(mask):
        for ring in (contour.outline, *contour.holes):
            assert len(np.unique(ring, axis=0)) == len(ring) >= 4


def test_a_frame_has_a_hole_and_an_island_in_it_is_a_piece_of_its_own() -> None:
    mask = np.zeros((9, 11), int)
    mask[1:8, 1:10] = 1
    mask[3:6, 3:8] = 0
    mask[4, 5] = 7
    frame, island = mask_contours(mask)
    assert frame.outline.tolist() == [[1, 1], [10, 1], [10, 8], [1, 8]]
    assert sorted(frame.holes[0].tolist()) == [[3, 3], [3, 6], [8, 3], [8, 6]]
    assert (frame.area, island.area, len(island.holes)) == (63 - 15, 1, 0)


def test_a_disc_has_the_area_of_its_pixels() -> None:
    y, x = np.indices((101, 121))
    disc = np.hypot(x - 60, y - 50) < 40
    (contour,) = mask_contours(disc)
    assert contour.area == disc.sum()
    (smooth,) = mask_contours(disc, tolerance=1.0)
    assert len(smooth.outline) < len(contour.outline) / 3
    assert smooth.area == pytest.approx(np.pi * 40**2, rel=0.03)


def test_outlines_are_in_pixels_of_the_full_image() -> None:
    mask = np.zeros((4, 5), bool)
    mask[1:3, 2:5] = True
    (contour,) = mask_contours(mask, scale=(16.0, 8.5))
    assert contour.outline.tolist() == [[32, 8.5], [80, 8.5], [80, 25.5], [32, 25.5]]


def test_a_simplified_ring_never_vanishes() -> None:
    (contour,) = mask_contours(np.ones((1, 1)), tolerance=50.0)
    assert contour.area == 1


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 4)])
def test_an_empty_mask_has_no_outline(shape: tuple[int, int]) -> None:
    assert mask_contours(np.zeros(shape)) == []


def test_a_volume_is_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(2, 3, 4\) has no outline"):
        mask_contours(np.zeros((2, 3, 4)))


def test_classes_survive_geojson_with_names_colours_and_holes(tmp_path: Path) -> None:
    labels = np.zeros((12, 12), int)
    labels[1:9, 1:9] = 1
    labels[3:5, 3:5] = 0
    labels[10:, 10:] = 2
    found = class_contours(labels, {1: "polyp", 2: "vessel", 3: "absent"})
    write_geojson(tmp_path / "a.geojson", found, {"polyp": (1, 2, 3)})
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert [f["properties"]["classification"] for f in features] == [
        {"name": "polyp", "color": [1, 2, 3]},
        {"name": "vessel"},
    ]
    assert len(features[0]["geometry"]["coordinates"]) == 2
    kept, _ = read_geojson(tmp_path / "a.geojson")
    assert [contour.area for contour in kept] == [64 - 4, 4]
