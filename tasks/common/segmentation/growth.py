"""Growth between two dated scans of one patient, and how much of it the voxel grid alone could have made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.errors import InputError
from tasks.common.bootstrap import Interval
from tasks.common.segmentation.overlap import voxel_volume_ml

Floats = NDArray[np.float64]

DAYS_PER_YEAR = 365.25


@dataclass(frozen=True)
class Growth:
    """Change of a structure's volume, each figure with the interval that resampling alone gives it.

    Attributes:
        first_ml, second_ml: volumes.
        days: between the scans.
        ml: second minus first.
        percent: of the first; NaN where the first is 0.
        ml_per_year: linear growth.
        doubling_days: days in which an exponentially growing structure doubles; NaN for one that did not grow. The
            interval reaches to infinity where some draws did not grow, and counts them as undefined.
    """

    first_ml: float
    first_interval: Interval
    second_ml: float
    second_interval: Interval
    days: int
    ml: float
    ml_interval: Interval
    percent: float
    percent_interval: Interval
    ml_per_year: float
    ml_per_year_interval: Interval
    doubling_days: float
    doubling_interval: Interval


def growth(
    first: ArrayLike,
    first_affine: ArrayLike,
    first_date: date | str,
    second: ArrayLike,
    second_affine: ArrayLike,
    second_date: date | str,
    spacing: float | Sequence[float] | None = None,
    draws: int = 64,
    level: float = 0.95,
    seed: int = 0,
) -> Growth:
    """Growth of a structure between two scans, which need not share a grid.

    The intervals hold what the position and size of the voxels do to the volumes, see :func:`resampled_volumes`. They
    say nothing of other causes of error, such as two observers or two sequences.

    Source: Schwartz, "A biomathematical approach to clinical tumor growth", Cancer 14, 1961 (volume-doubling time).

    Args:
        first, second: (X, Y, Z) masks of the structure.
        first_affine, second_affine: (4, 4) in mm.
        first_date, second_date: ``date`` or ISO text such as ``2024-05-31``; the second is the later one.
        spacing: grid in mm on which the scans are thought to be resampled, such as 1; their own by default.
        draws: positions of the grid that are tried for each scan.
        level: share of the draws within an interval.

    Raises:
        InputError: a date cannot be read or the second is not later, or a mask or affine is no such thing.
    """
    days = (_date(second_date) - _date(first_date)).days
    if days <= 0:
        raise InputError(f"the second scan ({second_date}) must be later than the first ({first_date}); swap the two.")
    if draws < 1 or not 0 < level < 1:
        raise InputError(f"draws={draws} must be at least 1 and level={level} between 0 and 1.")
    v = _volume(first, first_affine), _volume(second, second_affine)
    one = resampled_volumes(first, first_affine, spacing, draws, seed)
    two = resampled_volumes(second, second_affine, spacing, draws, seed + 1)
    percent, doubling = _percent(*v), _doubling_days(*v, days)
    return Growth(
        first_ml=float(v[0]),
        first_interval=_interval(v[0], one, level),
        second_ml=float(v[1]),
        second_interval=_interval(v[1], two, level),
        days=days,
        ml=float(v[1] - v[0]),
        ml_interval=_interval(v[1] - v[0], two - one, level),
        percent=float(percent),
        percent_interval=_interval(percent, _percent(one, two), level),
        ml_per_year=float((v[1] - v[0]) / days * DAYS_PER_YEAR),
        ml_per_year_interval=_interval((v[1] - v[0]) / days * DAYS_PER_YEAR, (two - one) / days * DAYS_PER_YEAR, level),
        doubling_days=float(doubling),
        doubling_interval=_to_infinity(_interval(doubling, _doubling_days(one, two, days), level)),
    )


def resampled_volumes(
    mask: ArrayLike,
    affine: ArrayLike,
    spacing: float | Sequence[float] | None = None,
    draws: int = 64,
    seed: int = 0,
) -> Floats:
    """Volumes (draws,) in ml of a mask on grids that begin at random fractions of a voxel.

    Between voxel centres the mask is taken as linear, and what reaches one half is inside, as when a mask is resampled.

    Args:
        mask: (X, Y, Z); anything but 0 is inside.
        affine: (4, 4) in mm; a sheared grid counts with its true volume.
        spacing: of the new grid in mm, along the axes of the mask; the mask's own by default.

    >>> cube = np.zeros((9, 9, 9), dtype=bool)
    >>> cube[2:7, 2:7, 2:7] = True
    >>> bool(np.ptp(resampled_volumes(cube, np.eye(4))) < 0.125)
    True
    """
    inside = np.asarray(mask) != 0
    voxel_ml = _voxel_ml(inside, affine)
    own = np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0)
    new = own if spacing is None else np.broadcast_to(np.asarray(spacing, dtype=np.float64), 3)
    if not (np.isfinite(new) & (new > 0)).all():
        raise InputError(f"the spacing {new.tolist()} must be positive lengths in mm.")
    ratio = new / own
    places = np.nonzero(inside)
    if not len(places[0]):
        return np.zeros(draws)
    box = tuple(slice(int(p.min()), int(p.max()) + 1) for p in places)
    field = np.pad(inside[box], 1).astype(np.float32)
    starts = np.random.default_rng(seed).random((draws, 3)) * ratio
    voxels = [np.count_nonzero(_sampled(field, start, ratio) >= 0.5) for start in starts]
    return np.array(voxels) * voxel_ml * ratio.prod()


def _sampled(field: NDArray[np.float32], start: Floats, ratio: Floats) -> NDArray[np.float32]:
    """The field, linear between its points, at ``start + k * ratio`` (in voxels) along each axis; 0 outside."""
    for axis in range(3):
        # from one step before the field, so that a grid whose first point lies inside it misses nothing
        at = np.arange(start[axis] - ratio[axis], field.shape[axis] - 1, ratio[axis])
        at = at[at >= 0]
        low = at.astype(np.int64)
        shape = [1, 1, 1]
        shape[axis] = -1
        share = (at - low).astype(np.float32).reshape(shape)
        high = np.minimum(low + 1, field.shape[axis] - 1)
        field = np.take(field, low, axis) * (1 - share) + np.take(field, high, axis) * share
    return field


def _volume(mask: ArrayLike, affine: ArrayLike) -> Floats:
    inside = np.asarray(mask) != 0
    return np.asarray(np.count_nonzero(inside) * _voxel_ml(inside, affine))


def _voxel_ml(mask: NDArray, affine: ArrayLike) -> float:
    if mask.ndim != 3:
        raise InputError(f"growth needs masks (X, Y, Z), not {mask.shape}.")
    return voxel_volume_ml(affine)


def _percent(first: Floats, second: Floats) -> Floats:
    return np.divide(100 * (second - first), first, out=np.full(np.shape(first), np.nan), where=first > 0)


def _doubling_days(first: Floats, second: Floats, days: int) -> Floats:
    grown = (first > 0) & (second > first)
    ratio = np.divide(second, first, out=np.full(np.shape(first), np.nan), where=grown)
    return days * np.log(2) / np.log(ratio)


def _interval(value: Floats | float, draws: Floats, level: float) -> Interval:
    """Percentile interval of the draws, widened to the value itself where it lies outside."""
    known = draws[np.isfinite(draws)]
    if not known.size:
        return Interval(float("nan"), float("nan"), int(draws.size))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.fmin(low, value)), float(np.fmax(high, value)), int(draws.size - known.size))


def _to_infinity(interval: Interval) -> Interval:
    """Draws without growth never double."""
    return Interval(interval.low, float("inf"), interval.undefined) if interval.undefined else interval


def _date(value: date | str) -> date:
    if isinstance(value, date):
        return value
    try:
        return date.fromisoformat(str(value).strip())
    except ValueError:
        raise InputError(f"the date '{value}' cannot be read; write it as YYYY-MM-DD.") from None
