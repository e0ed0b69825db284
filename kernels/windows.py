"""Which keys a query sees in neighbourhood attention, and which queries a key is seen by.

Hassani et al., Neighborhood Attention Transformer, CVPR 2023 (arXiv:2204.07143); Hassani and Shi, Dilated Neighborhood
Attention Transformer (2209.15001); Hassani et al., Generalized Neighborhood Attention (2504.16922).

Axes are independent: a window is the product of one interval per axis. With dilation ``d`` an axis falls into ``d``
groups of every d-th position that never see each other; within its group (``group`` coordinates) a window is an
interval. At a border the window is shifted inwards: it neither shrinks nor is padded. With stride ``s`` every ``s``
neighbouring queries share the window of one of them. A causal axis ends the window at the query itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import InputError
from kernels.tables import made_once


@dataclass(frozen=True)
class Axis:
    """One axis of the token grid.

    Attributes:
        length: tokens on the axis.
        kernel: keys in a window, at least 1 (1: the query itself).
        stride: queries that share a window, 1 to ``kernel``.
        dilation: distance between neighbouring keys of a window.
        causal: whether keys after the query are hidden.
    """

    length: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def group_length(self, group: int) -> int:
        """Positions ``group``, ``group + dilation``, ... on the axis."""
        return max(-((group - self.length) // self.dilation), 0)

    def interval(self, position: int) -> tuple[int, int]:
        """First and one past the last key of the query at ``position`` of its group, in group coordinates."""
        group, x = position % self.dilation, position // self.dilation
        length = self.group_length(group)
        leader = min(
            x // self.stride * self.stride + (self.stride - 1 if self.causal else self.stride // 2), length - 1
        )
        if self.causal:
            return max(leader - self.kernel + 1, 0), x + 1
        start = min(max(leader - self.kernel // 2, 0), length - self.kernel)
        return start, start + self.kernel

    def keys(self, position: int) -> range:
        """Positions on the axis that the query at ``position`` sees."""
        start, end = self.interval(position)
        group = position % self.dilation
        return range(start * self.dilation + group, end * self.dilation + group, self.dilation)

    def seen_by(self, position: int) -> range:
        """Positions on the axis whose windows hold the key at ``position``."""
        group, j = position % self.dilation, position // self.dilation
        length, k, s = self.group_length(group), self.kernel, self.stride
        if self.causal:
            low, high = j, length - 1 if j + k >= length else min((j + k - s) // s * s + s - 1, length - 1)
        else:
            half = k // 2
            low = 0 if j < k else max(-((k - 1 - half + s // 2 - j) // s), 0) * s
            high = length - 1 if j >= length - k else min((j + half - s // 2) // s * s + s - 1, length - 1)
        return range(low * self.dilation + group, (high + 1) * self.dilation + group, self.dilation)


@dataclass(frozen=True)
class Window:
    """The window of every axis of a 1-D, 2-D or 3-D grid."""

    axes: tuple[Axis, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens on each axis."""
        return tuple(axis.length for axis in self.axes)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Keys of a window on each axis."""
        return tuple(axis.kernel for axis in self.axes)

    @property
    def neighbours(self) -> int:
        """Keys of a window that is not causal."""
        return math.prod(self.kernel)


PerAxis = int | Sequence[int]


def window(
    grid: Sequence[int],
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    smallest_kernel: int = 2,
) -> Window:
    """Check the window of a grid; each setting is one value or one per axis.

    Raises:
        InputError: a setting has another number of axes than the grid, ``kernel * dilation`` exceeds an axis,
            ``stride`` is not within 1 to ``kernel``, or a number is too small.
    """
    settings = [_per_axis(v, len(grid), n) for n, v in (("kernel_size", kernel_size), ("stride", stride))]
    settings += [_per_axis(dilation, len(grid), "dilation"), _per_axis(is_causal, len(grid), "is_causal")]
    axes = []
    for number, (length, k, s, d, causal) in enumerate(zip(grid, *settings, strict=True)):
        where = f"axis {number} of the grid {tuple(grid)}"
        if k < smallest_kernel:
            raise InputError(f"kernel_size={k} on {where} is below {smallest_kernel}.")
        if d < 1:
            raise InputError(f"dilation={d} on {where} is below 1.")
        if not 1 <= s <= k:
            raise InputError(f"stride={s} on {where} is not within 1 to kernel_size={k}.")
        if k * d > length:
            raise InputError(
                f"kernel_size={k} times dilation={d} is {k * d}, more than the {length} tokens on {where}; "
                "take a smaller kernel or dilation, or pad the input."
            )
        axes.append(Axis(length, k, s, d, bool(causal)))
    return Window(tuple(axes))


def _per_axis(value: int | bool | Sequence[int] | Sequence[bool], axes: int, name: str) -> tuple[int, ...]:
    if isinstance(value, int):
        return (int(value),) * axes
    if not isinstance(value, Sequence) or not all(isinstance(v, int) for v in value):
        raise InputError(f"{name}={value} must be a whole number, or one for each of the {axes} axes.")
    if len(value) != axes:
        raise InputError(f"{name}={tuple(value)} has {len(value)} values for a grid of {axes} axes.")
    return tuple(int(v) for v in value)


# The tables below depend on sizes alone, are small, and are asked for by every call; they are made once.


@made_once(256)
def axis_mask(axis: Axis) -> Tensor:
    """(length, length) bool on the CPU: whether the query of a row sees the key of a column."""
    mask = torch.zeros(axis.length, axis.length, dtype=torch.bool)
    for position in range(axis.length):
        keys = axis.keys(position)
        mask[position, keys.start : keys.stop : keys.step] = True
    return mask


@made_once(256)
def axis_neighbours(axis: Axis) -> Tensor:
    """(length, kernel) int64 on the CPU: positions of each query's keys; the axis must not be causal."""
    assert not axis.causal, "a causal window has no fixed number of keys"
    return torch.tensor([list(axis.keys(position)) for position in range(axis.length)])


@made_once(256)
def axis_bias_index(axis: Axis) -> Tensor:
    """(length, length) int64 on the CPU: entry of a relative position table, key minus query in steps of the dilation.

    Where the query does not see the key the entry is clamped into the table and means nothing.
    """
    positions = torch.arange(axis.length)
    steps = torch.div(positions[None, :] - positions[:, None], axis.dilation, rounding_mode="floor")
    return (steps + axis.kernel - 1).clamp(0, 2 * axis.kernel - 2)


def window_mask(window: Window) -> Tensor:
    """(N, N) bool on the CPU over the flattened row-major grid: whether the query of a row sees the key of a column."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axis in window.axes:
        mask = torch.kron(mask.to(torch.uint8), axis_mask(axis).to(torch.uint8)).bool()
    return mask
