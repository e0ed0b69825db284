"""Masks made of simple shapes."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter


def box(shape: tuple[int, ...], *sides: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask that is true between the given first and last (exclusive) index of each axis."""
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*side) for side in sides)] = True
    return mask


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float) -> NDArray[np.bool_]:
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    return sum((x - c) ** 2 for x, c in zip(axes, centre, strict=True)) <= radius**2


def blobs(shape: tuple[int, ...], seed: int, sigma: float = 1.5, share: float = 0.3) -> NDArray[np.bool_]:
    """Random smooth shapes that fill about ``share`` of the grid."""
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma)
    return field > np.quantile(field, 1 - share)
