"""Intensities of a volume on a common scale, in place and without a wider copy of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
NORMALISATIONS = ("minmax", "zscore", "zscore_nonzero", "none")


def normalise(
    values: Floats, how: str, percentiles: Sequence[float] = (0, 100), window: Sequence[float] | None = None
) -> None:
    """Change ``values`` (any shape) in place; a constant volume becomes zeros.

    Args:
        how: ``minmax`` to [0, 1]; ``zscore`` to mean 0 and standard deviation 1; ``zscore_nonzero`` the same for the
            voxels that are not zero, which stay zero; ``none``.
        percentiles: clip at these of all voxels first.
        window: clip at these intensities before that.
    """
    if window is not None:
        np.clip(values, *window, out=values)
    if tuple(percentiles) != (0, 100):
        np.clip(values, *np.percentile(values, percentiles), out=values)
    if how == "minmax":
        low, high = values.min(), values.max()
        values -= low
        if high > low:
            values /= high - low
    elif how == "zscore":
        mean, deviation = _moments(values)
        values -= np.float32(mean)
        values /= np.float32(deviation or 1)
    elif how == "zscore_nonzero":
        mean, deviation = _moments(values, nonzero=True)
        for slab in _slabs(values):
            inside = slab != 0
            np.subtract(slab, np.float32(mean), out=slab, where=inside)
            np.divide(slab, np.float32(deviation or 1), out=slab, where=inside)


def _moments(values: Floats, nonzero: bool = False) -> tuple[float, float]:
    """Mean and standard deviation, summed in float64 slab by slab, deviations from the mean in a second pass."""
    count, total, square = 0, 0.0, 0.0
    for slab in _slabs(values):
        count += int(np.count_nonzero(slab)) if nonzero else slab.size
        total += float(slab.sum(dtype=np.float64))
    mean = total / max(count, 1)
    for slab in _slabs(values):
        off = slab[slab != 0].astype(np.float64) if nonzero else slab.astype(np.float64)
        off -= mean
        off *= off
        square += float(off.sum())
    return mean, float(np.sqrt(square / max(count, 1)))


def _slabs(values: Floats) -> Iterator[NDArray[Any]]:
    """Views along the axis of the largest stride, so that each is contiguous memory."""
    axis = int(np.argmax(np.abs(values.strides)))
    step = max(1, 2**22 * values.shape[axis] // max(values.size, 1))
    moved = np.moveaxis(values, axis, 0)
    for start in range(0, len(moved), step):
        yield moved[start : start + step]
