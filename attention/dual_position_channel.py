"""Dual attention: every place sums all places, every channel sums all channels, and both are added to the map.

Sources: Fu et al., Dual Attention Network for Scene Segmentation, CVPR 2019, arXiv 1809.02983, whose two modules are
also those of Sinha and Dolz, Multi-scale self-guided attention, JBHI 2020, arXiv 1906.02849; Bouget et al., Frontiers
in Radiology 2021, arXiv 2101.07715 (DAUNet). In DAUNet's released code the projections of the position attention are
made anew at every call, neither trained nor saved; here they are parameters. No matrix of places by places is kept
where there are many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attention.about import About
from attention.conv_norm import wide
from attention.cost import Part, elementwise, projection
from attention.gate import Gate
from attention.registry import register
from kernels.errors import InputError, unknown_name
from kernels.narrow_attention import narrow_attention
from kernels.operators import precisely

FORMS = ("danet", "daunet")


class PositionAttention(nn.Module):
    """``gamma`` times softmax attention between places, without scaling of the scores, added to the map.

    Args:
        dim: channels C.
        reduction: queries and keys have C / ``reduction`` channels, rounded down, but at least 1.
        form: ``"danet"``: projections have biases. ``"daunet"``: they have none.

    Raises:
        InputError: a parameter is not possible.
    """

    def __init__(self, dim: int, reduction: int = 8, form: str = "danet") -> None:
        super().__init__()
        _check_form(form)
        if reduction < 1:
            raise InputError(f"position attention: reduction={reduction} must be at least 1.")
        self.dim = dim
        self.width = max(dim // reduction, 1)
        self.qkv = nn.Linear(dim, 2 * self.width + dim, bias=form == "danet")
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, C, *spatial)."""
        return x + self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        """What is added to (B, C, *spatial)."""
        projected = self.qkv(x.flatten(2).transpose(1, 2))[:, None]
        q, k, v = projected.split([self.width, self.width, self.dim], -1)
        out = narrow_attention(q, k, v, scale=1.0)
        return self.gamma * out[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Three released convolutions, ``query_conv`` or ``query`` and so on, as one projection."""
        renamed = dict(state)
        for kind in ("weight", "bias"):
            names = [f"{name}{suffix}.{kind}" for name in ("query", "key", "value") for suffix in ("_conv", "")]
            parts = [renamed.pop(name) for name in names if name in renamed]
            if parts:
                renamed[f"qkv.{kind}"] = torch.cat([part.flatten(1) if part.dim() > 1 else part for part in parts])
        return renamed


class ChannelAttention(nn.Module):
    """``gamma`` times sums of channels, weighted by the softmax of their inner products, added to the map.

    Args:
        form: ``"danet"``: an output channel's weights are the softmax of the products' negatives, so that unlike
            channels weigh most. ``"daunet"``: the softmax of the products, where each input channel's weights in all
            outputs sum to 1.

    Raises:
        InputError: the form is not known.
    """

    def __init__(self, form: str = "danet") -> None:
        super().__init__()
        _check_form(form)
        self.form = form
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, C, *spatial)."""
        return x + self.branch(x)[0]

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to (B, C, *spatial), and the weights (B, C, C) of input channels (columns)."""
        flat = x.flatten(2)
        weights = self.weights(flat)
        return (self.gamma * (weights @ flat)).unflatten(2, x.shape[2:]), weights

    def weights(self, flat: Tensor) -> Tensor:
        """The weights (B, C, C), from each output channel (rows) to each input channel, for (B, C, N)."""
        # Products over all places are large and decide alone; rounded, or beyond float16, they would decide otherwise.
        with precisely(flat):
            products = wide(flat) @ wide(flat).mT
            weights = torch.softmax(-products, -1) if self.form == "danet" else torch.softmax(products, -1).mT
        return weights.to(flat.dtype)


@register("dual_position_channel", kind="gate")
class DualAttention(Gate):
    """Position and channel attention, each added to the map, summed (DANet, Fu et al. 2019; DAUNet, 2021).

    It does not multiply the map: the weights that are returned are those between channels, (B, C, C), from each output
    channel (rows) to each input channel.

    Args:
        dim: channels C.
        reduction: of the position attention's queries and keys.
        form: ``"danet"`` or ``"daunet"``, see :class:`PositionAttention` and :class:`ChannelAttention`.

    Raises:
        InputError: a parameter is not possible.
    """

    about = About("Fu et al. (DANet), CVPR 2019, 1809.02983; DAUNet, 2021", "O(N^2)", "sdpa", "BSD-2-Clause")
    grids = (1, 2, 3)

    def __init__(self, dim: int, reduction: int = 8, form: str = "danet") -> None:
        super().__init__(dim)
        self.position = PositionAttention(dim, reduction, form)
        self.channel = ChannelAttention(form)

    def apply_gate(self, x: Tensor, signal: Tensor | None) -> tuple[Tensor, Tensor]:
        channels, weights = self.channel.branch(x)
        return 2 * x + self.position.branch(x) + channels, weights

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, tokens = shape[0], math.prod(shape[1:])
        total = batch * tokens
        width = self.position.width
        return [
            projection("q, k, v", total, self.dim, self.dim + 2 * width),
            Part("places", 2 * total * tokens * (width + self.dim), 2 * total * (width + self.dim)),
            Part("products of channels", 2 * total * self.dim**2, total * self.dim + batch * self.dim**2),
            Part("sums of channels", 2 * total * self.dim**2, total * self.dim + batch * self.dim**2),
            elementwise("sum", total * self.dim, tensors=2, flops=5),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The two modules' states, called ``position`` and ``channel`` or, as in DANet's head, ``sa`` and ``sc``."""
        called = {"sa": "position", "sc": "channel"}
        renamed = {}
        for key, value in state.items():
            part, _, rest = key.partition(".")
            renamed[f"{called.get(part, part)}.{rest}"] = value
        inside = {k.removeprefix("position."): renamed.pop(k) for k in list(renamed) if k.startswith("position.")}
        return renamed | {f"position.{k}": v for k, v in PositionAttention.checkpoint_filter(inside).items()}


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise unknown_name("attention.form", form, FORMS)
