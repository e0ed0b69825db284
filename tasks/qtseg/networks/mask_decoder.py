"""QTSeg's mask decoder: one token per class travels from the coarsest map to the finest and says what is its own there.

Source: Tran et al., QTSeg, arXiv 2412.17241. A transposed convolution whose kernel is its stride is a linear layer on
cells, whose outputs are then put side by side. The last two of them are left unsorted here, each cell of stride 8
holding its 4 x 4 of stride 2, until the masks are made: of the widest maps nothing is ever moved in memory but the
logits. The published network ends there; a map of stride 4, where an encoder has one, is added half-way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.fourier_positions import FourierPositions
from attention.gate import Gate
from attention.layout import to_channels_first, to_channels_last
from kernels.errors import InputError
from tasks.qtseg.networks.dual_mix import DualMixBlock


class CellUp(nn.ConvTranspose2d):
    """Transposed convolution of kernel and stride 2, layer norm over channels, GELU, the new cells in two more axes.

    Cells (..., inputs) to (..., 2, 2, outputs), rows before columns. The weights are those of a transposed convolution.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 2, 2)
        self.norm = nn.LayerNorm(outputs, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        assert self.bias is not None
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)
        cells = F.linear(x, weight, self.bias.repeat(4)).unflatten(-1, (2, 2, -1))
        return F.gelu(self.norm(cells))


class TokenMlps(nn.Module):
    """For each class token an MLP of its own, three layers and ReLU between them: (B, K, inputs) to (B, K, outputs)."""

    def __init__(self, tokens: int, inputs: int, outputs: int) -> None:
        super().__init__()
        sides = ((inputs, inputs), (inputs, inputs), (inputs, outputs))
        self.weights = nn.ParameterList(torch.empty(tokens, i, o) for i, o in sides)
        self.biases = nn.ParameterList(torch.empty(tokens, 1, o) for _, o in sides)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = 1 / math.sqrt(inputs)  # as nn.Linear starts
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.relu() if i else x, weight)
        return x.transpose(0, 1)


class MaskDecoder(nn.Module):
    """Maps of strides 8, 16 and 32 to logits at stride 2.

    Args:
        num_classes: tokens K, with that of the background.
        width: the n of the paper: maps have 4n, 8n and 16n channels.
        depths: layers of the blocks at strides 8, 16 and 32.
        num_heads, mlp_dim: of these layers.
        gates: one for each map, finest first, or None; it decides by the features that come from the coarser map where
            it takes a signal.

    Raises:
        InputError: a number is not possible.
    """

    def __init__(
        self,
        num_classes: int = 2,
        width: int = 16,
        depths: Sequence[int] = (1, 2, 3),
        num_heads: int = 8,
        mlp_dim: int = 2048,
        gates: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        _check(num_classes, width, depths, num_heads, mlp_dim)
        widths = [4 * width, 8 * width, 16 * width]
        self.tokens = nn.Parameter(torch.randn(num_classes, widths[-1]))
        self.positions = nn.ModuleList(FourierPositions(dim) for dim in widths)
        self.blocks = nn.ModuleList(
            DualMixBlock(dim, depth, num_heads, mlp_dim) for dim, depth in zip(widths, depths, strict=True)
        )
        below = [widths[0], *widths[:-1]]
        self.mlps = nn.ModuleList(TokenMlps(num_classes, *sides) for sides in zip(widths, below, strict=True))
        self.ups = nn.ModuleList(CellUp(*sides) for sides in zip(widths[1:], widths[:-1], strict=True))
        self.last = nn.ModuleList([CellUp(widths[0], widths[0] // 2), CellUp(widths[0] // 2, widths[0])])
        self.gates = None if gates is None else nn.ModuleList(gates)

    def forward(self, levels: Sequence[Tensor], fine: Tensor | None = None) -> Tensor:
        """Logits (B, K, 4H, 4W).

        Args:
            levels: (B, 4n, H, W), (B, 8n, ceil(H/2), ceil(W/2)), (B, 16n, ceil(H/4), ceil(W/4)).
            fine: (B, 2n, h, w) at stride 4, at most twice as large as the first level, which is added half-way.
        """
        tokens, features, fine_cells = self.decode(levels, fine)
        whole = features.shape[1]
        rows = whole if _keeps(features) else max(1, _BLOCK // (features[:, 0].numel() * 16))
        parts = []
        for start in range(0, whole, rows):
            here = slice(start, start + rows)
            cells = self._cells(features[:, here], None if fine_cells is None else fine_cells[:, here])
            # (B, H, W, 2, 2, 2, 2, K): the halves of a row of stride 8, then those of the row of stride 4.
            parts.append((cells.flatten(1, 6) @ tokens.mT).unflatten(1, cells.shape[1:7]))
        return _sorted(parts[0] if len(parts) == 1 else torch.cat(parts, 1))

    def features(self, levels: Sequence[Tensor], fine: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits, and the map (B, 4n, 4H, 4W) that they are the tokens' inner products with."""
        tokens, features, fine_cells = self.decode(levels, fine)
        features = _sorted(self._cells(features, fine_cells))
        return torch.einsum("bkc,bchw->bkhw", tokens, features), features

    def decode(self, levels: Sequence[Tensor], fine: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens (B, K, 4n), features (B, H, W, 4n) at stride 8, and ``fine`` as their cells (B, H, W, 2, 2, 2n)."""
        tokens = self.tokens.expand(levels[0].shape[0], -1, -1)
        coarse: Tensor | None = None
        features = levels[-1]
        for i in range(len(levels) - 1, -1, -1):
            features = to_channels_last(self._gated(i, levels[i], coarse)).contiguous()
            if coarse is not None:
                features = features + coarse
            position = self.positions[i](*features.shape[1:3])[None].to(features.dtype)
            tokens, features = self.blocks[i](tokens, features, position)
            tokens = self.mlps[i](tokens)
            if i > 0:
                below = levels[i - 1].shape[2:]
                coarse = _beside(self.ups[i - 1](features))[:, : below[0], : below[1]]
        return tokens, features, None if fine is None else _apart(fine, features.shape[1:3])

    def _cells(self, features: Tensor, fine: Tensor | None) -> Tensor:
        """(B, H, W, 4n) at stride 8 as cells (B, H, W, 2, 2, 2, 2, 4n) at stride 2."""
        halves = self.last[0](features)
        return self.last[1](halves if fine is None else halves + fine)

    def _gated(self, i: int, level: Tensor, coarse: Tensor | None) -> Tensor:
        if self.gates is None:
            return level
        gate = self.gates[i]
        if coarse is not None and isinstance(gate, Gate) and gate.takes_signal:
            return gate(level, to_channels_first(coarse))
        return gate(level)


_BLOCK = 1 << 18
"""Numbers of the widest map that are made at a time where none is kept: as many as a core's own cache holds."""


def _keeps(x: Tensor) -> bool:
    """Whether the widest map is made at once: for the backward pass, for a graph, or where blocks save no time."""
    return torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling()


def _beside(cells: Tensor) -> Tensor:
    """(B, H, W, 2, 2, C) as (B, 2H, 2W, C)."""
    return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _sorted(cells: Tensor) -> Tensor:
    """(B, H, W, 2, 2, 2, 2, C) as (B, C, 4H, 4W)."""
    return cells.permute(0, 7, 1, 3, 5, 2, 4, 6).flatten(5, 7).flatten(2, 4)


def _apart(x: Tensor, grid: Sequence[int]) -> Tensor:
    """A map (B, C, h, w) as the cells (B, H, W, 2, 2, C) of ``grid`` (H, W), zeros where it ends before."""
    below, right = 2 * grid[0] - x.shape[2], 2 * grid[1] - x.shape[3]
    x = F.pad(x, (0, right, 0, below)) if below or right else x
    return x.unflatten(3, (grid[1], 2)).unflatten(2, (grid[0], 2)).permute(0, 2, 4, 3, 5, 1)


def _check(num_classes: int, width: int, depths: Sequence[int], num_heads: int, mlp_dim: int) -> None:
    if num_classes < 1 or width < 1 or mlp_dim < 1 or len(depths) != 3 or min(depths) < 1:
        raise InputError(
            f"decoder qtseg: classes={num_classes}, width={width} and mlp_dim={mlp_dim} must be at least 1 and "
            f"depths={list(depths)} three numbers of at least 1."
        )
    if num_heads < 1 or 2 * width % num_heads:
        fitting = ", ".join(str(n) for n in range(1, 2 * width + 1) if 2 * width % n == 0)
        raise InputError(
            f"decoder qtseg: num_heads={num_heads} must divide {2 * width}, twice the width; take one of {fitting}."
        )
