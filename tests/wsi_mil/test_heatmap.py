"""Scores become maps: normalisation, drawing, colours, and how well a known region is found."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from sklearn.metrics import roc_auc_score

from kernels.errors import InputError
from tasks.wsi_mil.heatmap import (
    check_mode,
    colour_limits,
    colourise,
    map_shape,
    normalise,
    overlay,
    pixel_auc,
    rasterise,
)
from tests.parity.harness import OWN, load_case


def drawn_tile_by_tile(values, xy, tile_size, slide_size, downsample):
    """The definition: a pixel is the mean of the tiles that hold its centre."""
    height, width = map_shape(slide_size, downsample)
    ys, xs = (np.arange(height) + 0.5) * downsample, (np.arange(width) + 0.5) * downsample
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for value, (x, y) in zip(values, xy, strict=True):
        inside = ((ys >= y) & (ys < y + tile_size))[:, None] & ((xs >= x) & (xs < x + tile_size))[None]
        total[inside] += value
        count[inside] += 1
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, total / count, np.nan)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 30),
    tile=st.integers(7, 90),
    # Quarters, so that an edge that falls on a pixel's centre does so exactly in both ways of reckoning.
    downsample=st.integers(4, 28).map(lambda quarters: quarters / 4),
    size=st.tuples(st.integers(40, 300), st.integers(40, 300)),
)
def test_a_pixel_is_the_mean_of_the_tiles_that_hold_its_centre(seed, count, tile, downsample, size):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=count)
    # Corners off the slide too: the last tile of a grid may cross the border.
    xy = rng.integers(-tile, max(size), size=(count, 2))
    expected = drawn_tile_by_tile(values, xy, tile, size, downsample)
    got = rasterise(values, xy, tile, size, downsample)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("downsample", [1.0, 3.0, 7.3, 16.0, 50.0])
def test_a_grid_of_tiles_leaves_no_gap_and_no_seam(downsample):
    tile, columns, rows = 113, 9, 7
    xy = np.array([(x * tile, y * tile) for y in range(rows) for x in range(columns)])
    values = np.arange(len(xy), dtype=float)
    heat = rasterise(values, xy, tile, (columns * tile, rows * tile), downsample)
    assert not np.isnan(heat).any()
    assert set(np.unique(heat)) <= set(values), "tiles side by side were mixed"


@pytest.mark.parametrize("edges", ["centre", "ceil"])
def test_strips_put_together_are_the_whole_map(edges):
    rng = np.random.default_rng(3)
    xy, values = rng.integers(-50, 900, size=(200, 2)), rng.random(200)
    whole = rasterise(values, xy, 61, (900, 700), 3.7, edges)
    cuts = [0, 1, 50, 51, 130, len(whole)]
    strips = [rasterise(values, xy, 61, (900, 700), 3.7, edges, rows) for rows in itertools.pairwise(cuts)]
    np.testing.assert_allclose(np.concatenate(strips), whole, rtol=1e-6)


def test_tiles_smaller_than_a_pixel_still_show():
    xy = np.array([[5, 5], [205, 105], [215, 105]])
    heat = rasterise(np.array([1.0, 2.0, 4.0]), xy, 8, (400, 200), 100)
    assert heat[0, 0] == 1 and heat[1, 2] == 3, "two tiles in one pixel are averaged"
    assert np.isnan(heat).sum() == heat.size - 2


def test_drawing_keeps_values_in_their_range_and_constants_constant():
    rng = np.random.default_rng(0)
    xy = rng.integers(0, 3000, size=(5000, 2))
    tiny = 10.0 ** rng.uniform(-12, 0, size=5000)
    heat = rasterise(tiny, xy, 64, (3000, 3000), 8)
    assert np.nanmin(heat) >= np.float32(tiny.min()) and np.nanmax(heat) <= np.float32(tiny.max())
    np.testing.assert_array_equal(
        rasterise(np.full(5000, 0.3), xy, 64, (3000, 3000), 8)[~np.isnan(heat)], np.float32(0.3)
    )


def test_no_tiles_make_an_empty_map():
    heat = rasterise(np.zeros(0), np.zeros((0, 2)), 64, (100, 50), 10)
    assert heat.shape == (5, 10) and np.isnan(heat).all()


def test_values_and_coordinates_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"3 values need coordinates \(3, 2\), not \(2, 2\)"):
        rasterise(np.zeros(3), np.zeros((2, 2)), 64, (100, 50), 10)


def test_rank_is_the_mean_rank_over_the_count_and_blind_to_monotone_changes():
    scores = np.array([0.1, 0.4, 0.4, 0.05])
    np.testing.assert_allclose(normalise(scores, "rank"), [0.5, 0.875, 0.875, 0.25])
    np.testing.assert_array_equal(normalise(np.exp(5 * scores), "rank"), normalise(scores, "rank"))


def test_each_branch_is_normalised_by_itself():
    branches = np.array([[0.2, 0.3, 0.5], [0.9, 0.1, 0.0]])
    for mode in ("raw", "rank", "minmax", "nscaled"):
        together = normalise(branches, mode)
        for row, scores in zip(together, branches, strict=True):
            np.testing.assert_array_equal(row, normalise(scores, mode))


def test_nscaled_is_one_for_uniform_attention_and_minmax_spans_zero_to_one():
    np.testing.assert_allclose(normalise(np.full(7, 1 / 7), "nscaled"), 1)
    np.testing.assert_allclose(normalise(np.array([2.0, 4.0, 3.0]), "minmax"), [0, 1, 0.5])
    np.testing.assert_array_equal(normalise(np.full(4, 0.25), "minmax"), 0.5)


def test_one_tile_can_be_normalised_in_every_mode():
    for mode in ("raw", "rank", "minmax", "nscaled"):
        value = normalise(np.ones(1), mode)
        low, high = colour_limits(value, mode)
        assert np.isfinite(value).all() and high > low


def test_normalising_leaves_the_scores_alone():
    scores = np.array([0.2, 0.8])
    normalise(scores, "raw")[:] = 0
    np.testing.assert_array_equal(scores, [0.2, 0.8])


def test_an_unknown_mode_gets_the_nearest_name():
    with pytest.raises(InputError, match=r"predict\.mode 'rnak' is not known. Did you mean 'rank'"):
        check_mode("rnak")


def test_nearly_uniform_attention_looks_nearly_uniform():
    assert colour_limits(np.full(50, 1.01), "nscaled") == (0.0, 2.0)
    assert colour_limits(np.append(np.zeros(999), 900.0), "nscaled")[1] == 2.0, "one tile must not darken all others"


def test_colours_are_those_of_matplotlib():
    values = np.linspace(0, 1, 1001)
    for name in ("viridis", "jet"):
        expected = (colormaps[name](values)[:, :3] * 255).astype(np.uint8)
        np.testing.assert_array_equal(colourise(values, colormap=name), expected)


def test_values_beyond_the_limits_get_the_end_colours():
    got = colourise(np.array([-3.0, 0.0, 2.0, 9.0]), (0.0, 2.0))
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_array_equal(got[2], got[3])


def test_an_unknown_colormap_gets_the_nearest_name():
    with pytest.raises(InputError, match=r"predict\.colormap 'viridris' is not known. Did you mean 'viridis'"):
        colourise(np.zeros(3), colormap="viridris")


def test_the_slide_is_untouched_where_no_tile_lies():
    rng = np.random.default_rng(1)
    slide = rng.integers(0, 256, (31, 47, 3), dtype=np.uint8)
    heat = rng.random((31, 47))
    heat[rng.random((31, 47)) < 0.5] = np.nan
    image = overlay(slide, heat, alpha=0.7)
    empty = np.isnan(heat)
    np.testing.assert_array_equal(image[empty], slide[empty])
    expected = 0.7 * colourise(heat[~empty]) + 0.3 * slide[~empty]
    assert np.abs(image[~empty] - expected).max() <= 0.51


def test_alpha_outside_zero_and_one_is_refused():
    with pytest.raises(InputError, match=r"predict\.alpha=1\.4 must lie between 0"):
        overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2)), alpha=1.4)


def test_clams_map_is_reproduced_to_the_last_pixel():
    case = load_case(OWN / "wsi_clam_heatmap.json")
    ranks = normalise(case.inputs["scores"].numpy(), "rank")
    heat = rasterise(ranks, case.inputs["coords"].numpy(), 64, (512, 384), 4, edges="ceil")
    image = overlay(np.full((96, 128, 3), 200, np.uint8), heat, "jet", 0.4)
    np.testing.assert_array_equal(image, case.expected["output.image"].numpy())
    np.testing.assert_allclose(ranks * 100, case.expected["output.percentiles"].numpy(), rtol=1e-7)


def test_pixel_auc_is_the_area_under_the_roc_curve_over_covered_pixels():
    rng = np.random.default_rng(2)
    xy = np.array([(x * 40, y * 40) for y in range(8) for x in range(11) if (x + y) % 5])
    values = rng.integers(0, 6, len(xy)).astype(float)  # with ties
    mask = rng.random((80, 110)) < 0.3
    heat = rasterise(values, xy, 40, (440, 320), 4)
    covered = ~np.isnan(heat)
    expected = roc_auc_score(mask[covered], heat[covered])
    assert pixel_auc(values, xy, 40, mask, 4) == pytest.approx(expected, abs=1e-12)


def test_a_map_that_is_the_region_scores_one_and_its_opposite_zero():
    mask = np.zeros((20, 20), bool)
    mask[5:10, 5:15] = True
    xy = np.array([(x * 5, y * 5) for y in range(20) for x in range(20)])
    values = mask.ravel().astype(float)
    assert pixel_auc(values, xy, 5, mask, 5) == 1
    assert pixel_auc(-values, xy, 5, mask, 5) == 0
    assert pixel_auc(np.ones(400), xy, 5, mask, 5) == 0.5
    assert math.isnan(pixel_auc(values, xy, 5, np.zeros((20, 20)), 5))
