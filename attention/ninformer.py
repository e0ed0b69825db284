"""NiNformer's gating unit: an MLP-Mixer within the block says how much of each projected entry passes.

Source: Abdullah and Aydin, NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function,
arXiv 2403.02411:

    y = linear(u) * Mixer(u),    Mixer = u + tokens(LN u), then + channels(LN .),

both of the Mixer's parts being two layers with GELU and dropout. Its token layers are made for one number of tokens;
on maps of another size they are interpolated, which is ours: those that read tokens are scaled by the ratio of sizes,
so that they keep their sums. :class:`NiNBlock` is the paper's block, with one LayerNorm in two places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, elementwise, projection
from attention.masking import blank
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from attention.resizing import resize
from kernels.errors import InputError


@register("ninformer", kind="mixer")
class NiNformerGating(Mixer):
    """Gating unit of NiNformer: a projection times an MLP-Mixer of the same tokens (Abdullah and Aydin 2024).

    It expects normalised tokens, as every mixer in a block does. A masked token adds nothing to the sums over tokens.

    Args:
        dim: channels C.
        input_size: the grid that the token layers are made for. A map with as many axes is interpolated axis by axis,
            another as the sequence of its tokens.
        hidden_dim: inner width of both MLPs; None for 2 C, the paper's ratio.
        dropout: probability after each layer of the MLPs while training.

    Raises:
        InputError: a size is not possible.
    """

    about = About("Abdullah and Aydin (NiNformer), 2024, 2403.02411", "O(N)", "", "BSD-3-Clause")
    grids = (1, 2, 3)
    has_weights = False

    def __init__(
        self, dim: int, input_size: Sequence[int] = (14, 14), hidden_dim: int | None = None, dropout: Probability = 0.5
    ) -> None:
        super().__init__(dim, 1)
        hidden = 2 * dim if hidden_dim is None else hidden_dim
        self.input_size = tuple(input_size)
        if not 1 <= len(self.input_size) <= 3 or min(self.input_size) < 1:
            raise InputError(f"attention 'ninformer': input_size={input_size} must be 1 to 3 sides of at least 1.")
        if hidden < 1 or not 0 <= dropout < 1:
            raise InputError(
                f"attention 'ninformer': hidden_dim={hidden} must be at least 1, and dropout={dropout} from 0 to less "
                "than 1."
            )
        tokens = math.prod(self.input_size)
        self.proj = nn.Linear(dim, dim)
        self.token_norm = nn.LayerNorm(dim)
        self.token_fc1 = nn.Linear(tokens, hidden)
        self.token_fc2 = nn.Linear(hidden, tokens)
        self.channel_norm = nn.LayerNorm(dim)
        self.channel_fc1 = nn.Linear(dim, hidden)
        self.channel_fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        grid = tuple(x.shape[1:-1])
        x = x.flatten(1, -2)
        read = self._resized(self.token_fc1.weight, grid) * (math.prod(self.input_size) / x.shape[1])
        write, shift = self._resized(self.token_fc2.weight.t(), grid), self._resized(self.token_fc2.bias[None], grid)
        tokens = blank(self.token_norm(x), None if mask is None else mask.flatten(1)).transpose(1, 2)
        hidden = self.drop(F.gelu(F.linear(tokens, read, self.token_fc1.bias)))
        gate = x + self.drop(F.linear(hidden, write.t(), shift[0])).transpose(1, 2)
        hidden = self.drop(F.gelu(self.channel_fc1(self.channel_norm(gate))))
        gate = gate + self.drop(self.channel_fc2(hidden))
        return (self.proj(x) * gate).to(x.dtype).unflatten(1, grid)

    def _resized(self, table: Tensor, grid: tuple[int, ...]) -> Tensor:
        """``table`` (R, tokens of ``input_size``) as (R, tokens of ``grid``)."""
        trained = self.input_size
        if len(grid) != len(trained):
            trained, grid = (math.prod(trained),), (math.prod(grid),)
        if grid == trained:
            return table
        precise = table.to(torch.promote_types(table.dtype, torch.float32)).unflatten(1, trained)
        return resize(precise[None], grid)[0].flatten(1).to(table.dtype)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, tokens = shape[0], math.prod(shape[1:])
        total, hidden = batch * tokens, self.token_fc1.out_features
        return [
            projection("projection", total, self.dim, self.dim),
            Part(
                "token layers",
                4 * total * self.dim * hidden,
                2 * total * self.dim + 2 * batch * self.dim * hidden + 2 * tokens * hidden,
            ),
            projection("channels in", total, self.dim, hidden),
            projection("channels out", total, hidden, self.dim),
            elementwise("normalisation and product", total * self.dim, tensors=5, flops=12),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The released names of the Mixer's layers to ours."""
        return _renamed(state)


class NiNBlock(nn.Module):
    """The block of NiNformer: ``x + gate(LN x)``, then ``x + MLP(LN x)``, with one and the same LayerNorm.

    Args:
        dim: channels C.
        input_size, hidden_dim, dropout: as of :class:`NiNformerGating`; the MLP has the same inner width.
    """

    def __init__(
        self, dim: int, input_size: Sequence[int], hidden_dim: int | None = None, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mgu = NiNformerGating(dim, input_size, hidden_dim, dropout)
        hidden = self.mgu.channel_fc1.out_features
        self.ffn_fc1 = nn.Linear(dim, hidden)
        self.ffn_fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *grid, C) of ``x`` (B, *grid, C); ``mask`` (B, *grid) is true for real tokens, others are 0."""
        x = blank(x, mask)
        x = x + self.mgu(self.norm(x), mask)
        hidden = self.drop(F.gelu(self.ffn_fc1(self.norm(x))))
        return blank(x + self.drop(self.ffn_fc2(hidden)), mask)

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The released names of the MLPs' layers to ours."""
        return _renamed(state)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {
        "Mixer.token_mix.0.": "token_norm.",
        "Mixer.token_mix.2.net.0.": "token_fc1.",
        "Mixer.token_mix.2.net.3.": "token_fc2.",
        "Mixer.channel_mix.0.": "channel_norm.",
        "Mixer.channel_mix.1.net.0.": "channel_fc1.",
        "Mixer.channel_mix.1.net.3.": "channel_fc2.",
        "ffn.net.0.": "ffn_fc1.",
        "ffn.net.3.": "ffn_fc2.",
    }
    for official, ours in parts.items():
        state = {key.replace(official, ours): value for key, value in state.items()}
    return state
