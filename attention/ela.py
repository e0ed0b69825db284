"""Efficient local attention: a gate for each row and each column of a map, from one convolution along the axis.

Source: Xu and Wan, ELA: Efficient Local Attention for Deep Convolutional Neural Networks, arXiv 2403.01123. The module
that timm calls ``ela`` is another one, and a variant here. On volumes, of which the paper does not speak, there is a
gate for each axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, elementwise
from attention.gate import Gate
from attention.registry import register
from kernels.errors import InputError, unknown_name


@dataclass(frozen=True)
class _Variant:
    kernel_size: int
    channels_per_group: int  # of the convolution
    norm_groups: int
    per_axis: bool = False  # a convolution and a norm for rows and others for columns
    silu: bool = False  # before the sigmoid


VARIANTS = {
    "tiny": _Variant(5, 1, 32),
    "base": _Variant(7, 1, 16),
    "small": _Variant(5, 8, 16),
    "large": _Variant(7, 8, 16),
    "timm": _Variant(7, 1, 1, per_axis=True, silu=True),
}


@register("ela", kind="gate")
class EfficientLocalAttention(Gate):
    """Efficient local attention: each axis's mean profile, convolved, normalised and squashed, weights the map.

    Args:
        dim: channels C, a multiple of the variant's normalisation groups (32 for tiny, 16 otherwise) and, for small
            and large, of 8.
        variant: ``"tiny"``, ``"base"``, ``"small"`` or ``"large"``, the paper's ELA-T, -B, -S and -L; or ``"timm"``,
            the module of that library: rows and columns have a convolution and a norm each, normalised over all
            channels together, and an activation comes before the gate. It takes images alone and any channels.

    Raises:
        InputError: the variant is not known, does not divide the channels, or does not take the map.
    """

    about = About("Xu and Wan, 2024, 2403.01123", "O(N)")
    grids = (1, 2, 3)

    def __init__(self, dim: int, variant: str = "base") -> None:
        super().__init__(dim)
        if variant not in VARIANTS:
            raise unknown_name("attention.variant", variant, VARIANTS)
        form = VARIANTS[variant]
        step = math.lcm(form.norm_groups, form.channels_per_group)
        if dim % step:
            fitting = [name for name, v in VARIANTS.items() if dim % math.lcm(v.norm_groups, v.channels_per_group) == 0]
            raise InputError(
                f"attention 'ela': variant={variant} needs channels in multiples of {step} and this map has {dim}; "
                f"variants that fit: {', '.join(fitting) or 'none'}."
            )
        self.silu = form.silu
        self.conv, self.gn = self._layers(form)
        self.conv_w: nn.Conv1d | None = None
        self.gn_w: nn.GroupNorm | None = None
        if form.per_axis:
            self.conv_w, self.gn_w = self._layers(form)

    def _layers(self, form: _Variant) -> tuple[nn.Conv1d, nn.GroupNorm]:
        conv = nn.Conv1d(
            self.dim,
            self.dim,
            form.kernel_size,
            padding=form.kernel_size // 2,
            groups=self.dim // form.channels_per_group,
            bias=False,
        )
        return conv, nn.GroupNorm(form.norm_groups, self.dim)

    def apply_gate(self, x: Tensor, signal: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.conv_w is not None and x.dim() != 4:
            raise InputError(
                f"attention 'ela': variant=timm has a convolution for rows and one for columns and takes images; got "
                f"{tuple(x.shape)}."
            )
        weights = torch.ones((), dtype=x.dtype, device=x.device)
        axes = range(2, x.dim())
        for axis in axes:
            others = [a for a in axes if a != axis]
            gate = self._gate(x.mean(others) if others else x, axis)
            weights = weights * gate[(..., *(slice(None) if a == axis else None for a in axes))]
        return x * weights, weights

    def _gate(self, profile: Tensor, axis: int) -> Tensor:
        conv, gn = self.conv, self.gn
        if axis == 3 and self.conv_w is not None and self.gn_w is not None:
            conv, gn = self.conv_w, self.gn_w
        normal = gn(conv(profile))
        return torch.sigmoid(F.silu(normal) if self.silu else normal)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, *grid = shape
        profiles = batch * self.dim * sum(grid)
        taps = self.conv.kernel_size[0] * self.conv.weight.shape[1]
        return [
            elementwise("profiles", batch * self.dim * math.prod(grid), tensors=1, flops=len(grid)),
            elementwise("convolution and gates", profiles, flops=2 * taps + 8),
            elementwise("product", batch * self.dim * math.prod(grid), flops=len(grid)),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The paper's state as it is, timm's with convolutions over one axis."""
        called = {"conv_h": "conv", "norm_h": "gn", "norm_w": "gn_w"}
        renamed = {}
        for key, value in state.items():
            layer, _, rest = key.partition(".")
            renamed[f"{called.get(layer, layer)}.{rest}"] = value.flatten(2) if value.dim() > 3 else value
        return renamed
