"""The grid covers a slide once, at the true resolution, in an order that never changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import InputError
from tasks.wsi_mil.tiling import plan_tiles, reading_order, tissue_share, tissue_tiles
from tasks.wsi_mil.tissue import Tissue

dimensions = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@settings(deadline=None)
@given(size=dimensions, tile=st.integers(16, 300), coarser=st.floats(1.0, 9.0), mpp=st.floats(0.1, 1.0))
def test_tiles_cover_the_slide_exactly_once(size: tuple[int, int], tile: int, coarser: float, mpp: float) -> None:
    plan = plan_tiles("a", size, mpp, [1.0, 4.0], requested_mpp=mpp * coarser, tile=tile)
    corners = plan.grid()
    assert len(np.unique(corners, axis=0)) == len(corners) == plan.columns * plan.rows
    assert corners.min() == 0
    for axis in (0, 1):
        starts = np.unique(corners[:, axis])
        assert (np.diff(starts) == plan.size).all()  # neither gap nor overlap
        assert starts[-1] < size[axis] <= starts[-1] + plan.size


@settings(deadline=None)
@given(size=dimensions, tile=st.integers(2, 300), data=st.data())
def test_overlapping_tiles_leave_no_gap_and_none_is_superfluous(
    size: tuple[int, int], tile: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    plan = plan_tiles("a", size, 0.5, [1.0], requested_mpp=0.5, tile=tile, overlap=overlap)
    assert plan.step == tile - overlap
    for axis, count in ((0, plan.columns), (1, plan.rows)):
        last = (count - 1) * plan.step
        assert last + plan.size >= size[axis]
        assert count == 1 or last - plan.step + plan.size < size[axis]


def test_the_order_is_row_by_row() -> None:
    plan = plan_tiles("a", (500, 300), 0.5, [1.0], requested_mpp=0.5, tile=200)
    np.testing.assert_array_equal(plan.grid(), [[0, 0], [200, 0], [400, 0], [0, 200], [200, 200], [400, 200]])
    assert plan.grid().dtype == np.int64


@pytest.mark.parametrize(
    ("mpp", "levels", "asked", "size", "level", "achieved"),
    [
        (0.5, [1, 2, 4], 0.5, 224, 0, 0.5),
        (0.499, [1], 0.5, 224, 0, 0.499),  # within the tolerance: as it is
        (0.25, [1, 2, 4], 0.5, 448, 1, 0.5),
        (0.25, [1, 4, 16], 0.5, 448, 0, 0.5),  # no level of 2: reduced from level 0
        (0.2527, [1, 4.0001, 16.0023], 1.0, 896, 1, 1.0108),
        (0.2738, [1, 4], 0.5, 409, 0, 0.49992),  # true micrometres, not a bucket of magnification
        (0.25, [1, 2, 4], 3.0, 2688, 2, 3.0),
    ],
)
def test_level_size_and_achieved_resolution(
    mpp: float, levels: list[float], asked: float, size: int, level: int, achieved: float
) -> None:
    plan = plan_tiles("a", (9000, 9000), mpp, levels, requested_mpp=asked, tile=224)
    assert (plan.size, plan.level) == (size, level)
    assert plan.achieved_mpp == pytest.approx(achieved, rel=1e-4)


@settings(deadline=None)
@given(
    mpp=st.floats(0.1, 1.0),
    asked=st.floats(0.1, 8.0),
    steps=st.lists(st.floats(1.2, 4.0), max_size=5),
    tile=st.integers(16, 512),
)
def test_the_achieved_resolution_keeps_its_tolerance_and_nothing_is_enlarged(
    mpp: float, asked: float, steps: list[float], tile: int
) -> None:
    levels = [1.0, *np.cumprod(steps).tolist()]
    if asked < 0.95 * mpp:
        with pytest.raises(InputError, match=r"slide 'S-1' has .* coarser than the .* never enlarged"):
            plan_tiles("S-1", (900, 900), mpp, levels, requested_mpp=asked, tile=tile)
        return
    plan = plan_tiles("S-1", (900, 900), mpp, levels, requested_mpp=asked, tile=tile)
    assert abs(plan.achieved_mpp / asked - 1) <= 0.05 + 0.5 / tile
    assert levels[plan.level] <= plan.downsample * (1 + 1e-9)
    assert plan.size >= tile
    assert plan.achieved_mpp == pytest.approx(mpp * plan.downsample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "data.tile=0"),
        ({"tile": 64, "overlap": 64}, "the overlap must be from 0 to 63"),
        ({"tile": 64, "overlap": -1}, "data.overlap=-1"),
        ({"tile": 64, "tolerance": 5.0}, "data.mpp_tolerance=5.0"),
    ],
)
def test_impossible_grids_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_tiles("a", (100, 100), 0.5, [1.0], requested_mpp=0.5, **options)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), factor=st.integers(1, 9), size=st.integers(1, 80), data=st.data())
def test_tissue_share_equals_counting_pixels(seed: int, factor: int, size: int, data: st.DataObject) -> None:
    mask = np.random.default_rng(seed).random((13, 17)) > 0.5
    full = np.zeros((13 * factor + 200, 17 * factor + 200))
    full[: 13 * factor, : 17 * factor] = mask.repeat(factor, 0).repeat(factor, 1)
    corner = data.draw(st.tuples(st.integers(0, 17 * factor - 1), st.integers(0, 13 * factor - 1)))
    tissue = Tissue(mask, (factor, factor), [])
    share = tissue_share(tissue, np.array([corner]), size)
    expected = full[corner[1] : corner[1] + size, corner[0] : corner[0] + size].sum() / size**2
    assert share[0] == pytest.approx(expected, abs=1e-9)


def test_shares_add_up_to_the_area_of_the_tissue() -> None:
    mask = np.random.default_rng(0).random((37, 53)) > 0.6
    tissue = Tissue(mask, (1000 / 53, 700 / 37), [])
    plan = plan_tiles("a", (1000, 700), 0.5, [1.0], requested_mpp=0.5, tile=97)
    total = tissue_share(tissue, plan.grid(), plan.size).sum() * plan.size**2
    assert total == pytest.approx(mask.mean() * 1000 * 700)


def test_tiles_with_too_little_tissue_are_left_out_in_order() -> None:
    mask = np.zeros((10, 10), bool)
    mask[:, :4] = True
    mask[:, 4] = [True] * 5 + [False] * 5
    plan = plan_tiles("a", (100, 100), 0.5, [1.0], requested_mpp=0.5, tile=20)
    corners, enough = tissue_tiles(plan, Tissue(mask, (10.0, 10.0), []), 0.5)
    assert enough == 0.5
    assert [tuple(c) for c in corners[:5]] == [(0, 0), (20, 0), (40, 0), (0, 20), (20, 20)]
    assert len(corners) == 10 + 2
    everything, _ = tissue_tiles(plan, Tissue(mask, (10.0, 10.0), []), 0.0)
    assert len(everything) == 10 + 3  # any tissue at all


def test_a_thin_core_is_not_dropped_but_the_share_lowered() -> None:
    mask = np.zeros((100, 100), bool)
    mask[:, 50:52] = True
    plan = plan_tiles("a", (1000, 1000), 0.5, [1.0], requested_mpp=0.5, tile=200)
    corners, enough = tissue_tiles(plan, Tissue(mask, (10.0, 10.0), []), 0.5)
    assert len(corners) == 5
    assert enough == 0.0625
    with pytest.raises(InputError, match="no tissue found"):
        tissue_tiles(plan, Tissue(np.zeros((5, 5), bool), (200.0, 200.0), []), 0.5)


@settings(deadline=None)
@given(columns=st.integers(1, 70), rows=st.integers(1, 70), step=st.integers(1, 300))
def test_the_reading_order_visits_every_tile_once(columns: int, rows: int, step: int) -> None:
    plan = plan_tiles("a", (columns * step, rows * step), 0.5, [1.0], requested_mpp=0.5, tile=step)
    order = reading_order(plan.grid(), plan.step)
    np.testing.assert_array_equal(np.sort(order), np.arange(columns * rows))


def test_the_reading_order_keeps_neighbours_together() -> None:
    plan = plan_tiles("a", (320, 320), 0.5, [1.0], requested_mpp=0.5, tile=10)
    corners = plan.grid()[reading_order(plan.grid(), plan.step)]
    for start in range(0, len(corners), 64):
        part = corners[start : start + 64]
        assert (np.ptp(part, axis=0) == 70).all()  # a square of 8 by 8 tiles
