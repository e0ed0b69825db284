"""Which token every tap of every window falls on, as tables that depend on sizes alone.

With zero padding a window may leave the grid. It is then described on the grid enlarged by zeros, on which every tap is
a token, so that one description serves both borders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.errors import InputError
from kernels.windows import Axis, PerAxis, axis_neighbours, window

BORDERS = ("shift", "zero")


@dataclass(frozen=True)
class Taps:
    """The windows of all tokens of a 1-D, 2-D or 3-D grid.

    Attributes:
        grid, kernel, dilation: one number per axis.
        zero: the window of a token is centred on it and sees zeros beyond the grid (an even window has one tap more
            before the token than after it); otherwise it is shifted inwards until it is within the grid.
    """

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    zero: bool

    @property
    def tokens(self) -> int:
        """Tokens of the grid, N."""
        return math.prod(self.grid)

    @property
    def size(self) -> int:
        """Taps of a window, P."""
        return math.prod(self.kernel)

    @property
    def table(self) -> tuple[int, ...]:
        """Shape of a head's table of relative positions."""
        return tuple(2 * k - 1 for k in self.kernel)

    @property
    def field(self) -> tuple[int, ...]:
        """The grid on which every tap is a token: the grid itself, or the enlarged one."""
        if not self.zero:
            return self.grid
        return tuple(n + (k - 1) * d for n, k, d in zip(self.grid, self.kernel, self.dilation, strict=True))

    @property
    def places(self) -> int:
        """Tokens of the field, M."""
        return math.prod(self.field)

    def enlarge(self, rows: Tensor) -> Tensor:
        """(..., *grid, D) as (..., M, D) over the field's M tokens."""
        if self.zero:
            margins: list[int] = [0, 0]
            for k, d in zip(reversed(self.kernel), reversed(self.dilation), strict=True):
                margins += [k // 2 * d, (k - 1 - k // 2) * d]
            rows = F.pad(rows, margins)
        return rows.flatten(-1 - len(self.grid), -2)

    def crop(self, rows: Tensor) -> Tensor:
        """The inverse: (..., M, D) as (..., *grid, D), a view."""
        rows = rows.unflatten(-2, self.field)
        if self.zero:
            for axis, (n, k, d) in enumerate(zip(self.grid, self.kernel, self.dilation, strict=True)):
                rows = rows.narrow(axis - len(self.grid) - 1, k // 2 * d, n)
        return rows

    def axis_index(self, axis: int) -> Tensor:
        """(L, K) int64: position on the field's axis of each tap of each token of the grid's axis."""
        n, k, d = self.grid[axis], self.kernel[axis], self.dilation[axis]
        if self.zero:
            return torch.arange(n)[:, None] + torch.arange(k) * d
        return axis_neighbours(Axis(n, k, dilation=d))

    def axis_relative(self, axis: int) -> Tensor:
        """(L, K) int64: entry of the table of relative positions of each tap, key minus query in steps of dilation."""
        n, k, d = self.grid[axis], self.kernel[axis], self.dilation[axis]
        steps = self.axis_index(axis) - torch.arange(n)[:, None]
        return torch.div(steps, d, rounding_mode="floor") + k - 1 - (k // 2 if self.zero else 0)

    def index(self) -> Tensor:
        """(N, P) int64: flattened token of the field that each tap falls on, increasing along a row."""
        return _flat([self.axis_index(axis) for axis in range(len(self.grid))], self.field)

    def relative(self) -> Tensor:
        """(N, P) int64: flattened entry of the table of relative positions."""
        return _flat([self.axis_relative(axis) for axis in range(len(self.grid))], self.table)


def _flat(axes: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Flattened row-major index over ``lengths`` of the product of the axes' (L, K) tables."""
    flat = torch.zeros(1, 1, dtype=torch.int64)
    for table, length in zip(axes, lengths, strict=True):
        flat = (flat[:, None, :, None] * length + table[None, :, None, :]).flatten(2).flatten(0, 1)
    return flat


def taps(grid: Sequence[int], kernel_size: PerAxis, dilation: PerAxis, padding: str) -> Taps:
    """Check the windows of a grid; ``kernel_size`` and ``dilation`` are one value or one per axis.

    Raises:
        InputError: a setting has another number of axes than the grid or is too small, the border is not known, or
            windows that are shifted inwards do not fit into the grid.
    """
    if padding not in BORDERS:
        raise InputError(f"padding={padding!r} is not known; take one of {', '.join(map(repr, BORDERS))}.")
    if not 1 <= len(grid) <= 3:
        raise InputError(f"a grid of {len(grid)} axes is not supported; 1 to 3 are.")
    settings = []
    for name, value in (("kernel_size", kernel_size), ("dilation", dilation)):
        each = (value,) * len(grid) if isinstance(value, int) else tuple(value)
        if len(each) != len(grid):
            raise InputError(f"{name}={each} has {len(each)} values for a grid of {len(grid)} axes.")
        settings.append(each)
    kernel, dilation_ = settings
    for axis, (k, d) in enumerate(zip(kernel, dilation_, strict=True)):
        if k < 1 or d < 1:
            raise InputError(f"kernel_size={k} and dilation={d} on axis {axis} must be at least 1.")
    if padding == "shift":
        window(grid, kernel, dilation=dilation_, smallest_kernel=1)
    return Taps(tuple(grid), kernel, dilation_, padding == "zero")
