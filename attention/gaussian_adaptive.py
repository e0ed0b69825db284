"""Gaussian adaptive attention: entries of an axis weighted by how near they lie to learned offsets from their mean.

Source: Ioannides et al., Gaussian Adaptive Attention is All You Need (GAAM), arXiv 2401.11143. A head is a contiguous
part of the axis (the last takes the remainder). With the mean and the unbiased variance of the part,

    w = product over g of N((x - mean - offset_g) / deviation; 0, c_g^2),    y = x w / sum of w over the part.

The densities are multiplied, as in the released code, although the paper calls them a mixture; a product of Gaussians
being one Gaussian, each entry costs one exponential. Knowing deviations: masked tokens are left out of means, variances
and parts (the released ``padding_value`` counts them); a part of one entry, whose unbiased variance does not exist, has
weight 1; an axis shorter than the number of heads gives one entry to each of the first heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, elementwise
from attention.gate import Gate
from attention.masking import blank
from attention.mixer import Mixer
from attention.parameters import NotNegative
from attention.pooling import join, numbered
from attention.registry import register
from kernels.errors import InputError, unknown_name
from kernels.operators import precisely

AXES = ("tokens", "channels")
_ABOUT = About("Ioannides et al. (GAAM), 2024, 2401.11143", "O(N)", "", "Apache-2.0")


class GaussianHeads(nn.Module):
    """The weights of GAAM along one axis, with the offsets and widths of each head's Gaussians.

    Args:
        num_heads: parts H of the axis.
        num_gaussians: densities G that are multiplied.
        eps: added to the variance, and the least sum that weights are divided by.

    Raises:
        InputError: a number is less than 1, or ``eps`` not positive.
    """

    def __init__(self, num_heads: int, num_gaussians: int = 5, eps: float = 1e-8) -> None:
        super().__init__()
        if min(num_heads, num_gaussians) < 1 or not eps > 0:
            raise InputError(
                f"attention 'gaussian_adaptive': num_heads={num_heads} and num_gaussians={num_gaussians} must be at "
                f"least 1, and eps={eps} greater than 0."
            )
        self.num_heads = num_heads
        self.eps = eps
        self.mean_offsets = nn.Parameter(torch.zeros(num_heads, num_gaussians))
        self.c = nn.Parameter(torch.randn(num_heads, num_gaussians).exp())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weights (B, L, K), float32 at least, of ``x`` (B, L, K) along its axis L; ``mask`` (B, L), true for real."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        with precisely(x):
            return self._weights(x, mask)

    def _weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        head = self._parts(x, mask)
        members = head[:, None] == torch.arange(self.num_heads, device=x.device)[:, None]  # (B or 1, H, L)
        if mask is not None:
            members = members & mask[:, None]
        member = members.to(x.dtype)
        count = member.sum(-1, keepdim=True)

        def spread(statistics: Tensor) -> Tensor:
            """Numbers of the heads (B or 1, H, K or 1) to the entries of their parts."""
            return statistics.gather(1, head[..., None].expand(statistics.shape[0], -1, statistics.shape[2]))

        # The product's exponent is (quadratic d^2 - 2 linear d + constant) / variance, d the distance from the mean.
        offsets, c = self.mean_offsets.to(x.dtype), self.c.to(x.dtype)
        quadratic, linear, constant = ((offsets**power / (2 * c**2)).sum(1)[None, :, None] for power in (0, 1, 2))
        highest = linear / quadratic  # the distance of largest weight
        distance = blank(x - spread(member @ x / count.clamp_min(1)), mask)
        variance = member @ distance.square() / (count - 1).clamp_min(1) + self.eps
        variance = torch.where(count < 2, 1, variance)
        each = x.shape[0], -1, -1
        rate = spread((quadratic / variance).expand(*each))
        weights = torch.exp(-rate * (distance - spread(highest.expand(head.shape[0], -1, -1))).square())
        # What the released code clamps is the sum of whole densities, whose common factor is left out above.
        factor = (constant - linear * highest) / variance + (2 * math.pi * c**2).log().sum(1)[None, :, None] / 2
        least = self.eps * factor.clamp_max(60).exp()
        return weights / spread(torch.maximum(member @ weights, least).expand(*each))

    def _parts(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The head of each entry, (B or 1, L)."""
        if mask is None:
            place = torch.arange(x.shape[1], device=x.device)[None]
            return (place // max(x.shape[1] // self.num_heads, 1)).clamp_max(self.num_heads - 1)
        size = (mask.sum(1, keepdim=True) // self.num_heads).clamp_min(1)
        return ((mask.cumsum(1) - 1).clamp_min(0) // size).clamp_max(self.num_heads - 1)


@register("gaussian_adaptive", kind="mixer")
class GaussianAdaptiveMixer(Mixer):
    """Gaussian adaptive attention over tokens, or over the channels of each (GAAM, Ioannides et al. 2024).

    Args:
        dim: channels C.
        num_heads: parts of the axis, each with Gaussians of its own.
        axis: ``"tokens"`` (in row-major order) or ``"channels"``.
        num_gaussians: densities that are multiplied.
        eps: added to variances, and the least sum that weights are divided by.

    Raises:
        InputError: the axis is not known, or a number is not possible.
    """

    about = _ABOUT
    grids = (1, 2, 3)
    has_weights = False

    def __init__(
        self, dim: int, num_heads: int, axis: str = "tokens", num_gaussians: int = 5, eps: NotNegative = 1e-8
    ) -> None:
        super().__init__(dim, num_heads)
        self.axis = _known(axis)
        self.heads = GaussianHeads(num_heads, num_gaussians, eps)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        tokens = x.flatten(1, -2)
        return _weighted(self.heads, tokens, self.axis, None if mask is None else mask.flatten(1)).view(x.shape)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        return _cost(math.prod(shape) * self.dim, self.num_heads)

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state, in which each head is a module, to ours."""
        return _stacked(state, "", "heads.")


@register("gaussian_adaptive", kind="gate")
class GaussianAdaptiveGate(Gate):
    """Gaussian adaptive attention over the channels at every place of a map (GAAM, Ioannides et al. 2024).

    Args:
        dim: channels C.
        num_heads: parts of the channels, each with Gaussians of its own; the last takes the remainder.
        num_gaussians: densities that are multiplied.
        eps: added to variances, and the least sum that weights are divided by.

    Raises:
        InputError: there are more heads than channels, or a number is not possible.
    """

    about = _ABOUT
    grids = (1, 2, 3)

    def __init__(self, dim: int, num_heads: int = 4, num_gaussians: int = 5, eps: NotNegative = 1e-8) -> None:
        super().__init__(dim)
        if num_heads > dim:
            raise InputError(f"attention 'gaussian_adaptive': num_heads={num_heads} is more than the {dim} channels.")
        self.heads = GaussianHeads(num_heads, num_gaussians, eps)

    def apply_gate(self, x: Tensor, signal: Tensor | None) -> tuple[Tensor, Tensor]:
        weights = self.heads(x.flatten(2)).view(x.shape)
        return (x * weights).to(x.dtype), weights.to(x.dtype)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        return _cost(math.prod(shape) * self.dim, self.heads.num_heads)

    checkpoint_filter = staticmethod(GaussianAdaptiveMixer.checkpoint_filter)


class GaussianBlock(nn.Module):
    """Layers of GAAM on sequences, each added to its input: ``x <- layer(x) + x``.

    Args:
        axes: ``"tokens"`` or ``"channels"`` for each layer.
        num_heads, num_gaussians: of each layer.
        eps: as of :class:`GaussianHeads`.

    Raises:
        InputError: the lists are not equally long, or hold what is not possible.
    """

    def __init__(
        self, axes: Sequence[str], num_heads: Sequence[int], num_gaussians: Sequence[int], eps: float = 1e-8
    ) -> None:
        super().__init__()
        if not len(axes) == len(num_heads) == len(num_gaussians):
            raise InputError(
                f"GaussianBlock takes one axis, num_heads and num_gaussians for each layer; got {len(axes)}, "
                f"{len(num_heads)} and {len(num_gaussians)}."
            )
        self.axes = [_known(axis) for axis in axes]
        self.layers = nn.ModuleList(GaussianHeads(h, g, eps) for h, g in zip(num_heads, num_gaussians, strict=True))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, C) of ``x`` (B, N, C); ``mask`` (B, N) is true for real tokens, others are 0."""
        x = blank(x, mask)
        for axis, layer in zip(self.axes, self.layers, strict=True):
            x = blank(_weighted(layer, x, axis, mask) + x, mask)
        return x

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state, in which each head is a module, to ours."""
        for layer in range(len(state)):
            state = _stacked(state, f"layers.{layer}.", f"layers.{layer}.")
        return state


def _known(axis: str) -> str:
    if axis not in AXES:
        raise unknown_name("attention.axis", axis, AXES)
    return axis


def _weighted(heads: nn.Module, x: Tensor, axis: str, mask: Tensor | None) -> Tensor:
    """``x`` (B, N, C) times its weights along ``axis``."""
    if axis == "tokens":
        weights = heads(x, mask)
    else:  # every token for itself: all of them are columns beside the channels
        weights = heads(x.flatten(0, 1).t()[None])[0].t().unflatten(0, x.shape[:2])
    return (x * weights).to(x.dtype)


def _stacked(state: dict[str, Tensor], official: str, ours: str) -> dict[str, Tensor]:
    """The parameters of all heads of one layer in one tensor each."""
    for kind in ("mean_offsets", "c"):
        join(state, ours + kind, numbered(state, f"{official}attention_heads.{{}}.{kind}"), stack=True)
    return state


def _cost(elements: float, heads: int) -> list[Part]:
    return [
        elementwise("mean, variance and sum", elements, tensors=1, flops=6 * heads),
        elementwise("weights and product", elements, flops=8),
    ]
