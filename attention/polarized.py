"""Polarized self-attention: a gate for each channel and one for each place, both from inner products with the map.

Source: Liu et al., Polarized Self-Attention: Towards High-quality Pixel-wise Regression, arXiv 2107.00782. The paper's
equations and its released code differ in where the softmax and the normalisation are; both are here, by ``form``. The
equations leave out what sits between the layers; this follows the usual reading, with biases. Full maps are not
projected: queries fold into the value projections, which leaves products of the map with vectors. Only the released
sequential form needs a projected map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from attention.about import About
from attention.conv_norm import wide
from attention.cost import Part, elementwise
from attention.gate import Gate
from attention.registry import register
from kernels.errors import InputError, unknown_name

FORMS = ("paper", "released")

# By the released code's name and by that in a much used implementation of the paper's equations.
_NAMES = {
    "conv_q_right": "channel_query",
    "conv_v_right": "channel_value",
    "conv_up": "channel_up",
    "conv_q_left": "spatial_query",
    "conv_v_left": "spatial_value",
    "ch_wq": "channel_query",
    "ch_wv": "channel_value",
    "ch_wz": "channel_up",
    "ln": "norm",
    "sp_wq": "spatial_query",
    "sp_wv": "spatial_value",
}


class PolarizedAttention(Gate):
    """What the parallel and the sequential layout share.

    Args:
        dim: channels C.
        form: ``"paper"`` or ``"released"``.
    """

    about = About("Liu et al., 2021, 2107.00782", "O(N)", licence="Apache-2.0")
    grids = (1, 2, 3)
    step: ClassVar[dict[str, int]] = {"paper": 2, "released": 2}
    """What the channels must be a multiple of."""

    def __init__(self, dim: int, form: str = "paper") -> None:
        super().__init__(dim)
        if form not in FORMS:
            raise unknown_name("attention.form", form, FORMS)
        if dim % self.step[form]:
            raise InputError(
                f"attention '{self.name}': form={form} needs channels in multiples of {self.step[form]} and this map "
                f"has {dim}."
            )
        self.form = form
        bias = form == "paper"
        self.channel_query = nn.Linear(dim, 1, bias=False)
        self.channel_value = nn.Linear(dim, dim // 2, bias=bias)
        self.channel_up = self._up(bias)
        self.norm = nn.LayerNorm(dim) if form == "paper" else nn.Identity()
        self.spatial_query = nn.Linear(dim, dim // 2, bias=bias)
        self.spatial_value = nn.Linear(dim, dim // 2, bias=bias)
        for layer in (self.channel_query, self.channel_value, self.spatial_query, self.spatial_value):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def _up(self, bias: bool) -> nn.Module:
        return nn.Linear(self.dim // 2, self.dim, bias=bias)

    def channel_gate(self, flat: Tensor) -> Tensor:
        """(B, C) from the map (B, C, N)."""
        attention = torch.softmax(wide(self.channel_query.weight @ flat), -1).to(flat.dtype)
        context = (flat @ attention.mT)[..., 0]
        return torch.sigmoid(self.norm(self.channel_up(self.channel_value(context))))

    def spatial_gate(self, flat: Tensor, gate: Tensor | None) -> Tensor:
        """(B, N) from the map (B, C, N), or from the product of the map and a channel gate (B, C)."""
        mean = flat.mean(-1)
        query = self.spatial_query(mean if gate is None else mean * gate)
        if self.form == "paper":
            query = torch.softmax(wide(query), -1).to(query.dtype)
        direction = query @ self.spatial_value.weight
        logits = ((direction if gate is None else direction * gate)[:, None] @ flat)[:, 0]
        if self.spatial_value.bias is not None:
            logits = logits + query @ self.spatial_value.bias[:, None]
        if self.form == "released":
            logits = torch.softmax(wide(logits), -1).to(logits.dtype)
        return torch.sigmoid(logits)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, tokens = shape[0], math.prod(shape[1:])
        elements = batch * tokens * self.dim
        weights = sum(p.numel() for p in self.parameters())
        return [
            elementwise("channel query", elements, tensors=1, flops=2),
            elementwise("channel context", elements, tensors=1, flops=2),
            elementwise("mean and spatial query", elements, tensors=2, flops=3),
            Part("vectors", 2 * batch * weights, weights),
            elementwise("product", elements, flops=2),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Either implementation's state, 1 x 1 convolutions as matrices."""
        renamed = {}
        for key, value in state.items():
            layer, _, rest = key.partition(".")
            # The bias of the channel query shifts all logits of a softmax alike: it has no effect, and is not here.
            if key != "ch_wq.bias":
                renamed[f"{_NAMES.get(layer, layer)}.{rest}"] = value.flatten(1) if value.dim() > 3 else value.flatten()
        return renamed


@register("polarized_parallel", kind="gate")
class PolarizedParallel(PolarizedAttention):
    """Polarized self-attention whose channel and spatial gates are summed (PSA-p, Liu et al. 2021).

    Args:
        dim: channels C, even.
        form: ``"paper"``: the channel gate is layer-normalised, the spatial query is a softmax over its channels.
            ``"released"``: no normalisation, no biases, and the softmax over places comes after the product with the
            spatial query, so that the spatial gate is close to 1/2 everywhere on large maps.

    Raises:
        InputError: the form is not known, or the channels do not fit.
    """

    def apply_gate(self, x: Tensor, signal: Tensor | None) -> tuple[Tensor, Tensor]:
        flat, grid = x.flatten(2), x.shape[2:]
        channel, place = self.channel_gate(flat), self.spatial_gate(flat, None)
        weights = (channel[..., None] + place[:, None]).unflatten(2, grid)
        return x * weights, weights


@register("polarized_sequential", kind="gate")
class PolarizedSequential(PolarizedAttention):
    """Polarized self-attention whose spatial gate sees the channel-gated map (PSA-s, Liu et al. 2021).

    Args:
        dim: channels C; even for the paper's form, a multiple of 8 for the released one.
        form: ``"paper"``: the channel gate is layer-normalised, the spatial query is a softmax over its channels.
            ``"released"``: the channel gate passes a bottleneck of C / 8, and the spatial values are a softmax over
            places, which are then weighted by the spatial query.

    Raises:
        InputError: the form is not known, or the channels do not fit.
    """

    step: ClassVar[dict[str, int]] = {"paper": 2, "released": 8}

    def _up(self, bias: bool) -> nn.Module:
        if self.form == "paper":
            return super()._up(bias)
        hidden = self.dim // 8
        return nn.Sequential(
            nn.Linear(self.dim // 2, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, self.dim)
        )

    def apply_gate(self, x: Tensor, signal: Tensor | None) -> tuple[Tensor, Tensor]:
        flat, grid = x.flatten(2), x.shape[2:]
        channel = self.channel_gate(flat)
        weights = (channel[..., None] * self.spatial_gate(flat, channel)[:, None]).unflatten(2, grid)
        return x * weights, weights

    def spatial_gate(self, flat: Tensor, gate: Tensor | None) -> Tensor:
        if self.form == "paper" or gate is None:
            return super().spatial_gate(flat, gate)
        query = self.spatial_query(flat.mean(-1) * gate)
        values = (self.spatial_value.weight * gate[:, None]) @ flat
        shares = torch.softmax(wide(values), -1).to(values.dtype)
        return torch.sigmoid((query[:, None] @ shares)[:, 0])

    def cost(self, shape: Sequence[int]) -> list[Part]:
        if self.form == "paper":
            return super().cost(shape)
        tokens = math.prod(shape)
        return [*super().cost(shape), Part("spatial values", tokens * self.dim * (self.dim + 3), tokens * self.dim)]
