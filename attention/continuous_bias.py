"""Position bias as a function of the offset: log-spaced coordinates, and from one number per offset to all pairs.

Source: Liu et al., Swin Transformer V2, CVPR 2022, arXiv 2111.09883; with pooled keys: Shi, TransNeXt, CVPR 2024, arXiv
2311.17132. Keys that are means of a cell lie at the mean of its places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def relative_coordinates(
    size: Sequence[int], keys: Sequence[int], trained: Sequence[int], device: torch.device | None = None
) -> tuple[Tensor, list[int], list[Tensor]]:
    """Coordinates of all offsets between the places of a map and the cells it is pooled to.

    Args:
        size: of the map of queries.
        keys: cells along each axis; ``size`` for keys that are not pooled.
        trained: size whose largest offset is 8 before the logarithm.

    Returns:
        (T, axes) float32 coordinates, the last axis's offset changing fastest; how many there are along each axis; and
        for each axis (queries, keys), which of its offsets a pair has. For cells of unequal sizes there are offsets
        that no pair has.
    """
    lines, indices = [], []
    for n, m, side in zip(size, keys, trained, strict=True):
        # Twice the places, which are whole numbers: a cell's mean place lies on a token or between two.
        cells = torch.arange(m, device=device)
        centres = (cells * n) // m + ((cells + 1) * n + m - 1) // m - 1
        lowest, highest = -(((m - 1) * n) // m + n - 1), 2 * (n - 1) - (-(-n // m) - 1)
        step = 1 if n % m else 2
        offsets = torch.arange(lowest, highest + 1, step, device=device) / 2
        scaled = offsets / max(side - 1, 1) * 8
        lines.append(scaled.sign() * torch.log2(scaled.abs() + 1) / 3)
        indices.append((2 * torch.arange(n, device=device)[:, None] - centres - lowest) // step)
    table = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, -2)
    return table, [len(line) for line in lines], indices


def spread_bias(table: Tensor, offsets: Sequence[int], indices: Sequence[Tensor]) -> Tensor:
    """The bias of every pair, from one of every offset.

    Args:
        table: (T, heads), a row for each of the coordinates.
        offsets: how many there are along each axis; their product is T.
        indices: for each axis (queries, keys), which offset a pair has.

    Returns:
        (heads, queries, keys).
    """
    bias = table.t().unflatten(1, list(offsets))
    for axis, index in enumerate(indices, 1):
        n, m = index.shape
        if n % m == 0:
            # Equal cells: the offsets of a key are a window of the table. A sum in a fixed order, unlike an index.
            bias = bias.unfold(axis, n, n // m).flip(axis)
        else:
            bias = bias.index_select(axis, index.t().flatten()).unflatten(axis, (m, n)).movedim(axis + 1, -1)
    keys, queries = bias.shape[1 : 1 + len(indices)].numel(), bias.shape[1 + len(indices) :].numel()
    return bias.reshape(-1, keys, queries).transpose(1, 2)
