"""A map cut into regions of equal size, and which regions of the keys each region of the queries is routed to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.errors import InputError
from kernels.operators import precisely

RegionSize = int | Sequence[int]


@dataclass(frozen=True)
class Regions:
    """Regions of ``rows`` x ``columns`` tokens over a map, in row-major order; the last ones may stick out of the map.

    Tokens of a region are in row-major order as well.
    """

    height: int
    width: int
    rows: int
    columns: int

    @property
    def down(self) -> int:
        """Regions from top to bottom."""
        return -(-self.height // self.rows)

    @property
    def across(self) -> int:
        """Regions from left to right."""
        return -(-self.width // self.columns)

    @property
    def count(self) -> int:
        """Regions of the map."""
        return self.down * self.across

    @property
    def tokens(self) -> int:
        """Tokens of a region, those outside the map included."""
        return self.rows * self.columns

    @property
    def ragged(self) -> bool:
        """Whether regions stick out of the map."""
        return self.down * self.rows != self.height or self.across * self.columns != self.width

    def split(self, x: Tensor) -> Tensor:
        """A map (B, H, W, heads, D) as regions (B, heads, regions, tokens, D); zeros outside the map."""
        x = self.whole(x)
        blocks = x.unflatten(2, (self.across, self.columns)).unflatten(1, (self.down, self.rows))
        return blocks.permute(0, 5, 1, 3, 2, 4, 6).reshape(x.shape[0], x.shape[3], self.count, self.tokens, x.shape[4])

    def whole(self, x: Tensor) -> Tensor:
        """A map (B, H, W, heads, D) with zeros where regions stick out of it."""
        right, below = self.across * self.columns - self.width, self.down * self.rows - self.height
        return F.pad(x, (0, 0, 0, 0, 0, right, 0, below)) if self.ragged else x

    def join(self, x: Tensor, planes: bool) -> Tensor:
        """Regions (B, heads, regions, tokens, D) as a dense (B, heads, D, H, W) if planes, else (B, H, W, heads, D)."""
        blocks = x.unflatten(3, (self.rows, self.columns)).unflatten(2, (self.down, self.across))
        height, width = self.down * self.rows, self.across * self.columns
        if planes:
            whole = blocks.permute(0, 1, 6, 2, 4, 3, 5).reshape(*x.shape[:2], x.shape[4], height, width)
            return whole[..., : self.height, : self.width].contiguous()
        whole = blocks.permute(0, 2, 4, 3, 5, 1, 6).reshape(x.shape[0], height, width, x.shape[1], x.shape[4])
        return whole[:, : self.height, : self.width].contiguous()

    def numbers(self, device: torch.device) -> Tensor:
        """(H * W,) int64: the region of each token of the map, in row-major order."""
        row, column = (torch.arange(n, device=device) for n in (self.height, self.width))
        down, across = row // self.rows, column // self.columns
        return (down[:, None] * self.across + across).flatten()

    def inside(self, device: torch.device) -> Tensor:
        """(regions, tokens) bool: whether a token is on the map."""
        ones = torch.ones(1, self.height, self.width, 1, 1, dtype=torch.bool, device=device)
        return self.split(ones)[0, 0, :, :, 0]


def regions(shape: Sequence[int], size: RegionSize) -> Regions:
    """The regions of a (height, width) map.

    Raises:
        InputError: the size is not one or two positive numbers, or the map is empty.
    """
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or min(both) < 1:
        raise InputError(f"a region size is one or two positive numbers (rows, columns); got {size}.")
    if min(shape) < 1:
        raise InputError(f"bi-level routing needs a map of at least one token; got height x width {tuple(shape)}.")
    return Regions(shape[0], shape[1], both[0], both[1])


def as_map(x: Tensor, num_heads: int | None, name: str = "q") -> Tensor:
    """A (B, C, H, W) or (B, H, W, heads, D) tensor as a view (B, H, W, heads, D).

    Raises:
        InputError: it has neither shape, or ``num_heads`` is absent, does not divide C or is not its number of heads.
    """
    if x.dim() == 5:
        if num_heads not in (None, x.shape[3]):
            raise InputError(
                f"{name} {tuple(x.shape)} is (B, H, W, heads, D) with {x.shape[3]} heads, not {num_heads}."
            )
        return x
    if x.dim() != 4:
        raise InputError(f"{name} must be (B, C, H, W) or (B, H, W, heads, D); got {tuple(x.shape)}.")
    if num_heads is None or num_heads < 1 or x.shape[1] % num_heads:
        raise InputError(
            f"{name} {tuple(x.shape)} is (B, C, H, W): num_heads must divide its {x.shape[1]} channels; got "
            f"{num_heads}."
        )
    return x.unflatten(1, (num_heads, x.shape[1] // num_heads)).permute(0, 3, 4, 1, 2)


@torch.no_grad()
def route_regions(
    q: Tensor,
    k: Tensor,
    region_size: RegionSize,
    topk: int,
    *,
    kv_region_size: RegionSize | None = None,
    num_heads: int | None = None,
) -> Tensor:
    """The ``topk`` key regions whose mean key is most like the mean query of a region; all heads share them.

    Similarity is the dot product over all channels. Means are over the tokens on the map, without gradient, in float32
    whatever the dtype of ``q``. BiFormer (Zhu et al., CVPR 2023), the form for (B, C, H, W) maps.

    Args:
        q: (B, C, H, W) or (B, H, W, heads, D).
        k: the same with its own height and width.
        region_size: rows and columns of a region of queries, or one number for both.
        kv_region_size: the same for keys; ``region_size`` by default.
        num_heads: not needed here; checked where ``q`` has heads.

    Returns:
        (B, 1, query regions, topk) int64, most similar first.

    Raises:
        InputError: shapes do not fit, or there are fewer than ``topk`` key regions.
    """
    a, b = (
        as_map(q, num_heads or (1 if q.dim() == 4 else None)),
        as_map(k, num_heads or (1 if k.dim() == 4 else None), "k"),
    )
    key_size = region_size if kv_region_size is None else kv_region_size
    query_grid, key_grid = regions(a.shape[1:3], region_size), regions(b.shape[1:3], key_size)
    if not 1 <= topk <= key_grid.count:
        raise InputError(
            f"topk {topk} must be from 1 to the {key_grid.count} key regions of {key_grid.rows} x {key_grid.columns} "
            "tokens."
        )
    with precisely(q):
        similarity = _means(a, query_grid) @ _means(b, key_grid).mT
    return similarity.topk(topk, dim=-1).indices[:, None]


def _means(x: Tensor, grid: Regions) -> Tensor:
    """(B, regions, C): mean of each region's tokens on the map."""
    precise = torch.promote_types(x.dtype, torch.float32)
    x = grid.whole(x)
    # One axis after the other: over both at once PyTorch's sum takes ten times as long on the CPU.
    rows = x.unflatten(1, (grid.down, grid.rows)).sum(2, dtype=precise)
    sums = rows.unflatten(2, (grid.across, grid.columns)).sum(3).flatten(3).flatten(1, 2)
    if not grid.ragged:
        return sums / grid.tokens
    return sums / grid.inside(x.device).sum(1, dtype=precise)[:, None]
