"""Attention gates on the skip connections of U-Nets: where a decoder's signal says to look.

Sources: Bouget et al., Meningioma segmentation in T1-weighted MRI leveraging global context and attention mechanisms,
Frontiers in Radiology 2021, arXiv 2101.07715, whose released gate concatenates the projected signal and map; Oktay et
al., Attention U-Net, MIDL 2018, arXiv 1804.03999, which adds them. The paper of the sum has no batch normalisation and
reduces the map to the signal's grid by a strided convolution; here it is averaged. A signal of another size is
projected before it is resized, which is the same in another order and cheaper; while training, its batch statistics are
therefore those of its own grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.conv_norm import fold, pointwise_norm
from attention.cost import Part, elementwise, projection
from attention.gate import Gate
from attention.masked_mean import adaptive_mean
from attention.parameters import NotNegative
from attention.registry import register
from attention.resizing import resize
from kernels.errors import InputError, unknown_name

MERGES = ("concatenation", "sum")
RESOLUTIONS = ("map", "signal")

# By the neutral names of the released gate, whose framework has no state dict.
_NAMES = {
    "wg": "signal_proj",
    "bng": "signal_norm",
    "wx": "map_proj",
    "bnx": "map_norm",
    "psi": "score",
    "bnp": "score_norm",
}


@register("attention_gate", kind="gate")
class AttentionGate(Gate):
    """Attention gate of a skip connection: one weight for each place (AGUNet, Bouget et al. 2021; Oktay et al. 2018).

    Without a signal the map decides for itself.

    Args:
        dim: channels of the map.
        signal_dim: channels of the signal; ``dim`` when left out.
        hidden_dim: channels that map and signal are projected to; half of ``dim`` when left out, as in AGUNet.
        merge: ``"concatenation"`` of the projections, as in AGUNet, or their ``"sum"``, as in Attention U-Net.
        resolution: whether weights are made at the size of the ``"map"``, or at that of the ``"signal"`` and then
            resized.
        norm: whether the projections and the score are batch-normalised.
        norm_eps: of the batch normalisation; AGUNet's is that of Keras.

    Raises:
        InputError: a parameter is not possible, or the signal does not fit.
    """

    about = About("Bouget et al. (AGUNet), 2021, 2101.07715; Oktay et al., 2018", "O(N)", licence="BSD-2-Clause")
    grids = (1, 2, 3)
    takes_signal = True

    def __init__(
        self,
        dim: int,
        signal_dim: int | None = None,
        hidden_dim: int | None = None,
        merge: str = "concatenation",
        resolution: str = "map",
        norm: bool = True,
        norm_eps: NotNegative = 1e-3,
    ) -> None:
        super().__init__(dim)
        if merge not in MERGES:
            raise unknown_name("attention.merge", merge, MERGES)
        if resolution not in RESOLUTIONS:
            raise unknown_name("attention.resolution", resolution, RESOLUTIONS)
        self.signal_dim = dim if signal_dim is None else signal_dim
        self.hidden_dim = max(dim // 2, 1) if hidden_dim is None else hidden_dim
        if min(self.signal_dim, self.hidden_dim) < 1 or norm_eps <= 0:
            raise InputError(
                f"attention 'attention_gate': signal_dim={self.signal_dim} and hidden_dim={self.hidden_dim} must be at "
                f"least 1 and norm_eps={norm_eps} above 0."
            )
        self.merge = merge
        self.resolution = resolution
        self.signal_proj = nn.Conv1d(self.signal_dim, self.hidden_dim, 1)
        self.map_proj = nn.Conv1d(dim, self.hidden_dim, 1)
        self.score = nn.Conv1d(self.hidden_dim * (2 if merge == "concatenation" else 1), 1, 1)
        for layer in (self.signal_proj, self.map_proj, self.score):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.signal_norm, self.map_norm, self.score_norm = (
            # Keras's momentum, 0.99, is counted from the other end.
            nn.BatchNorm1d(channels, eps=norm_eps, momentum=0.01) if norm else nn.Identity()
            for channels in (self.hidden_dim, self.hidden_dim, 1)
        )

    def apply_gate(self, x: Tensor, signal: Tensor | None) -> tuple[Tensor, Tensor]:
        signal = self._checked(x, signal)
        here, there = x.shape[2:], signal.shape[2:]
        source = x
        if self.resolution == "signal" and here != there:
            source = adaptive_mean(x, None, there)[0]
        grid = source.shape[2:]
        key = _projected(source.flatten(2), self.map_proj, self.map_norm)
        query = _projected(signal.flatten(2), self.signal_proj, self.signal_norm).unflatten(2, there)
        weights = torch.sigmoid(self._scores(resize(query, grid).flatten(2), key)).unflatten(2, grid)
        weights = resize(weights, here)
        return x * weights, weights

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        norm = self.score_norm
        weight, bias = self.score.weight, self.score.bias
        if isinstance(norm, nn.BatchNorm1d) and not norm.training:
            weight, bias = fold(self.score, norm)
        if self.merge == "sum":
            scores = F.conv1d(torch.relu(query + key), weight, bias)
        else:
            # The two halves of the concatenation, each by its half of the weights.
            first, second = weight.chunk(2, dim=1)
            scores = F.conv1d(torch.relu(query), first, bias) + F.conv1d(torch.relu(key), second)
        return norm(scores) if norm.training else scores

    def _checked(self, x: Tensor, signal: Tensor | None) -> Tensor:
        given = x if signal is None else signal
        fits = given.dim() == x.dim() and given.shape[:2] == (x.shape[0], self.signal_dim)
        if fits and min(given.shape[2:]) > 0:
            return given
        if signal is None:
            raise InputError(
                f"attention 'attention_gate': the map has {self.dim} channels and the gate was built for a signal of "
                f"{self.signal_dim}, so it cannot do without one; pass a signal or leave signal_dim out."
            )
        raise InputError(
            f"attention 'attention_gate': the signal must be ({len(x)}, {self.signal_dim}, "
            f"{', '.join('DHW'[2 - x.dim() :])}) for a map {tuple(x.shape)}; got {tuple(signal.shape)}."
        )

    def cost(self, shape: Sequence[int]) -> list[Part]:
        """For a signal of the map's size."""
        tokens = math.prod(shape)
        merged = self.score.in_channels
        return [
            projection("signal", tokens, self.signal_dim, self.hidden_dim),
            projection("map", tokens, self.dim, self.hidden_dim),
            Part("score", 3 * tokens * merged, tokens * merged),
            elementwise("product", tokens * self.dim),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The released gate's state, convolutions over one axis."""
        renamed = {}
        for key, value in state.items():
            layer, _, rest = key.partition(".")
            renamed[f"{_NAMES.get(layer, layer)}.{rest}"] = value.flatten(2) if value.dim() > 3 else value
        return renamed


def _projected(x: Tensor, conv: nn.Conv1d, norm: nn.Module) -> Tensor:
    return pointwise_norm(x, conv, norm) if isinstance(norm, nn.BatchNorm1d) else conv(x)
