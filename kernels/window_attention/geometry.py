"""Where the tokens of a window lie in the map.

The two axes are alike and independent. An axis is extended to a multiple of the window, rolled by the shift, and cut:
token t of window i stands at i * window_step + t * token_step of the rolled axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.tables import made_once

RELEASED_MASK = -100.0  # what the released code adds to the score of tokens on two sides of an edge


@dataclass(frozen=True)
class Axis:
    """One axis of the map.

    Attributes:
        length: tokens on the axis.
        window: tokens of a window on it.
        grid: whether a window's tokens are spread over the whole axis instead of adjacent.
        shift: how far the axis is rolled towards 0.
    """

    length: int
    window: int
    grid: bool
    shift: int

    @property
    def windows(self) -> int:
        return -(-self.length // self.window)

    @property
    def padded(self) -> int:
        return self.windows * self.window

    @property
    def window_step(self) -> int:
        return 1 if self.grid else self.window

    @property
    def token_step(self) -> int:
        return self.windows if self.grid else 1


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``stop`` of every window of a span; that of its first window lies at ``position``."""

    start: int
    stop: int
    position: int


@dataclass(frozen=True)
class Span:
    """Neighbouring windows of an axis that are alike.

    Attributes:
        count: of the windows.
        pieces: the runs of tokens that exist in the map.
        padded: for each token, whether it belongs to the extension.
        wrapped: for each token, whether the shift carried it around the edge.
    """

    axis: Axis
    count: int
    pieces: tuple[Piece, ...]
    padded: tuple[bool, ...]
    wrapped: tuple[bool, ...]

    @property
    def whole(self) -> bool:
        """Whether a window is one run of tokens."""
        return len(self.pieces) == 1 and not any(self.padded)

    def part(self, start: int, count: int) -> Span:
        """Some of the windows."""
        step = start * self.axis.window_step
        pieces = tuple(replace(piece, position=piece.position + step) for piece in self.pieces)
        return replace(self, count=min(count, self.count - start), pieces=pieces)


@made_once(256)
def spans(axis: Axis) -> tuple[Span, ...]:
    """The windows of an axis: one span unless there is a shift or an extension, and then a few."""
    found: list[Span] = []
    for index in range(axis.windows):
        rolled = [index * axis.window_step + t * axis.token_step for t in range(axis.window)]
        places = [(p + axis.shift) % axis.padded for p in rolled]
        padded = tuple(p >= axis.length for p in places)
        wrapped = tuple(p >= axis.padded - axis.shift for p in rolled)
        if found and (found[-1].padded, found[-1].wrapped) == (padded, wrapped):
            found[-1] = replace(found[-1], count=found[-1].count + 1)
            continue
        cuts = [t for t in range(1, axis.window) if (padded[t - 1], wrapped[t - 1]) != (padded[t], wrapped[t])]
        runs = zip([0, *cuts], [*cuts, axis.window], strict=True)
        pieces = tuple(Piece(start, stop, places[start]) for start, stop in runs if not padded[start])
        found.append(Span(axis, 1, pieces, padded, wrapped))
    return tuple(found)


@dataclass(frozen=True)
class Geometry:
    """How a map is cut into windows, and what is hidden within them.

    Attributes:
        released: tokens on two sides of an edge are kept apart by -100 instead of -inf.
        hide: the extension is not seen.
    """

    rows: Axis
    columns: Axis
    released: bool
    hide: bool

    @property
    def tokens(self) -> int:
        """Of a window."""
        return self.rows.window * self.columns.window


def geometry(
    shape: Sequence[int], window: Sequence[int], grid: bool, shift: Sequence[int], released: bool, hide: bool
) -> Geometry:
    """The geometry of a map of ``shape`` (B, H, W, ...)."""
    rows, columns = (Axis(shape[1 + i], window[i], grid, shift[i]) for i in range(2))
    return Geometry(rows, columns, released, hide)


@made_once(256)
def mask(
    rows: tuple[tuple[bool, ...], tuple[bool, ...]],
    columns: tuple[tuple[bool, ...], tuple[bool, ...]],
    released: bool,
    hide: bool,
) -> Tensor | None:
    """What is added to the scores of a window, (tokens, tokens) float64; None where nothing is.

    Args:
        rows, columns: ``padded`` and ``wrapped`` of the window's two spans.
    """
    padded = (torch.tensor(rows[0])[:, None] | torch.tensor(columns[0])).flatten()
    side = (2 * torch.tensor(rows[1]).int()[:, None] + torch.tensor(columns[1]).int()).flatten()
    apart = side[:, None] != side
    added = torch.zeros(len(side), len(side), dtype=torch.float64)
    added.masked_fill_(apart, RELEASED_MASK if released else -torch.inf)
    if hide:
        added.masked_fill_(padded, -torch.inf)
    # Outputs of the extension are dropped; letting it see everything keeps it from being a row that sees nothing.
    added.masked_fill_(padded[:, None], 0)
    return added if added.any() else None
