"""Windowed products as dense matrix products over bands of rows, on any device.

The windows of a run of tokens lie within one run of tokens. Their weights are scattered into a dense matrix of the two
runs, zero outside the windows, which is multiplied with the rows themselves: no row is copied. One band over the whole
grid is the plain dense product.

A zero times a number that is not finite is not zero: tokens of the band that hold one reach every output of the band,
not only those whose windows hold them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.dynamic_conv.taps import Taps
from kernels.tables import made_once

LEAST_BAND = 64  # tokens; below, a product does not fill the machine
SMALL_GRID = 256  # tokens; up to here one band over the whole grid is as fast as several
NUMBERS_AT_ONCE = 1 << 22


def heads_at_once(taps: Taps) -> int:
    """How many heads the functions below may be given for a band's matrices to stay at 16 MB."""
    largest = max((b - a) * (d - c) for a, b, c, d in _bands(taps))
    return max(NUMBERS_AT_ONCE // max(largest, 1), 1)


def weighted_sum(weights: Tensor, rows: Tensor, taps: Taps) -> Tensor:
    """(b, N, P) and (b, M, D) to (b, N, D)."""
    out = rows.new_empty(len(rows), taps.tokens, rows.shape[2])
    for first, last, low, high, index in _runs(taps, weights):
        torch.bmm(_dense(weights[:, first:last], index, high - low), rows[:, low:high], out=out[:, first:last])
    return out


def transposed_sum(weights: Tensor, rows: Tensor, taps: Taps) -> Tensor:
    """(b, N, P) and (b, N, D) to (b, M, D)."""
    out = rows.new_zeros(len(rows), taps.places, rows.shape[2])
    for first, last, low, high, index in _runs(taps, weights):
        matrix = _dense(weights[:, first:last], index, high - low)
        out[:, low:high].baddbmm_(matrix.mT, rows[:, first:last])
    return out


def products(q: Tensor, k: Tensor, scale: float, taps: Taps) -> Tensor:
    """(b, N, D) and (b, M, D) to (b, N, P)."""
    out = q.new_empty(len(q), taps.tokens, taps.size)
    for first, last, low, high, index in _runs(taps, q):
        dense = q[:, first:last] @ k[:, low:high].mT
        torch.gather(dense, 2, index.expand(len(q), -1, -1), out=out[:, first:last])
    return out.mul_(scale)


def _dense(weights: Tensor, index: Tensor, width: int) -> Tensor:
    """(b, n, P) as (b, n, width)."""
    if weights.shape[2] == width:  # every window is the whole run
        return weights
    dense = weights.new_zeros(*weights.shape[:2], width)
    return dense.scatter_(2, index.expand(len(weights), -1, -1), weights)


def _runs(taps: Taps, like: Tensor) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """Each band's first and last token, the first and last token of its windows, and its taps among those."""
    index = _index(taps, like.device)
    for first, last, low, high in _bands(taps):
        yield first, last, low, high, index[first:last] - low


@made_once(16)
def _index(taps: Taps, device: torch.device) -> Tensor:
    return taps.index().to(device)


@made_once(64)
def _bands(taps: Taps) -> list[tuple[int, int, int, int]]:
    """Bands of whole slices along the first axis."""
    index = taps.index()
    slice_ = taps.tokens // max(taps.grid[0], 1)
    step = max(math.ceil(LEAST_BAND / max(slice_, 1)), 1) * slice_
    if taps.tokens <= SMALL_GRID:
        step = taps.tokens
    bands = []
    for first in range(0, taps.tokens, max(step, 1)):
        run = index[first : first + step]
        bands.append((first, min(first + step, taps.tokens), int(run.min()), int(run.max()) + 1))
    return bands
