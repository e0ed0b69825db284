"""ContMix: every token mixes its neighbours by kernels made of its affinity with the regions of the whole map.

Source: Lou and Yu, OverLoCK, CVPR 2025 (oral), arXiv 2502.20087. This is the part of the ContMix block that mixes
tokens; the whole block is :class:`attention.contmix_block.ContMixBlock`. The projection from regions to taps is applied
to the regions' keys before the queries, which is the same product in another order. Masks, of which the paper does not
speak, leave masked tokens out of regions, windows, pooling, resizing and batch statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attention.about import About
from attention.conv_norm import ConvNorm
from attention.cost import Part, depthwise, elementwise, projection
from attention.dilated_reparam import DilatedReparam
from attention.dynamic_kernels import apply_kernels, average, fitting_size, kernel_logits, resize
from attention.layout import to_channels_first, to_channels_last, weights_of
from attention.masked_norm import masked_batch_norm
from attention.mixer import Mixer
from attention.registry import register
from kernels.errors import InputError, unknown_name

SMALL_MAPS = ("resize", "refuse")


@register("contmix", kind="mixer")
class ContMix(Mixer):
    """ContMix dynamic convolution with a large and a small kernel of each token's own (OverLoCK, Lou and Yu 2025).

    The first half of the channels is mixed by small kernels, the second by large ones, P taps in all; each half falls
    into G = 2 ``num_heads`` groups, and windows are shifted inwards at the borders. Weights are returned for the G
    groups of the small kernels, then for those of the large ones. A static kernel as large is added, and the sum is
    weighted by squeeze and excitation and by a gate.

    Args:
        dim: channels C, a multiple of 4 ``num_heads``.
        num_heads: half the number of groups.
        kernel_size: side K of the large kernel, odd from 5 to 19.
        smk_size: side of the small kernel, at most K.
        regions: sides of the grid of regions.
        small_maps: what happens to a map with an axis shorter than K. ``"resize"``: it is mixed at a size whose shorter
            side is K, and averaged back, as in the released code. ``"refuse"``: an error.

    Raises:
        InputError: a size is not possible, or a map is too small and to be refused.
    """

    about = About("Lou and Yu (OverLoCK), CVPR 2025, 2502.20087", "O(N P)", "dynamic_conv", "Apache-2.0")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        smk_size: int = 5,
        regions: int = 7,
        small_maps: str = "resize",
    ) -> None:
        super().__init__(dim, num_heads)
        if dim % (4 * num_heads):
            raise InputError(
                f"attention 'contmix': dim={dim} must be a multiple of 4 num_heads = {4 * num_heads}, since each half "
                f"of the channels falls into {2 * num_heads} groups."
            )
        if not 1 <= smk_size <= kernel_size:
            raise InputError(f"attention 'contmix': smk_size={smk_size} must be from 1 to kernel_size={kernel_size}.")
        if regions < 1:
            raise InputError(f"attention 'contmix': regions={regions} must be at least 1.")
        if small_maps not in SMALL_MAPS:
            raise unknown_name("attention.small_maps", small_maps, SMALL_MAPS)
        self.groups = 2 * num_heads
        self.kernel_size = kernel_size
        self.smk_size = smk_size
        self.regions = regions
        self.small_maps = small_maps
        self.scale = (dim // self.groups) ** -0.5
        self.weight_query = ConvNorm(dim, dim // 2)
        self.weight_key = ConvNorm(dim, dim // 2, first=1)
        self.weight_value = ConvNorm(dim, dim)
        self.weight_proj = nn.Conv2d(regions**2, smk_size**2 + kernel_size**2, 1)
        self.fusion_proj = ConvNorm(dim, dim)
        self.lepe = nn.Sequential(DilatedReparam(dim, kernel_size), nn.BatchNorm2d(dim))
        self.se_layer = SqueezeExcitation(dim)
        self.gate = ConvNorm(dim, dim)
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, dim, 1))
        self.rpb1 = nn.Parameter(torch.zeros(self.groups, 2 * smk_size - 1, 2 * smk_size - 1))
        self.rpb2 = nn.Parameter(torch.zeros(self.groups, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.apply(init_convolution)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        x = to_channels_first(x)
        large_norm, out_norm = self.lepe[1], self.proj[0]
        assert isinstance(large_norm, _BatchNorm) and isinstance(out_norm, _BatchNorm)
        static = masked_batch_norm(large_norm, self.lepe[0](x, mask), mask)
        mixed = self.fusion_proj(self.mixed(x, mask), mask)
        gate = F.silu(self.gate(x, mask))
        out = gate * self.se_layer(mixed + static, mask)
        return to_channels_last(self.proj[1](masked_batch_norm(out_norm, out, mask)))

    def mixed(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the kernels make of the values of (B, C, H, W), in the same shape."""
        source, seen = self.fitted(x, mask)
        out = self._convolve(self.value(source, seen), self.logits(source, seen), seen)
        return self._brought_back(out, seen, (x.shape[2], x.shape[3]))

    def fitted(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``x`` and its mask at the size at which they are mixed, which is not smaller than the kernel."""
        height, width = x.shape[2:]
        if self.small_maps == "refuse" and min(height, width) < self.kernel_size:
            raise InputError(
                f"attention 'contmix': a map of {height} x {width} is smaller than kernel_size={self.kernel_size}; "
                "take small_maps=resize or a smaller kernel."
            )
        return resize(x, mask, fitting_size((height, width), self.kernel_size))

    def value(self, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """Values (B, C, H, W) of a fitted map."""
        return self.weight_value(source, mask)

    def logits(self, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, G, H, W, P) kernel logits of a fitted map without their biases by offset, the small kernel's first."""
        query = self.weight_query(source, mask)
        region, filled = average(source, mask, (self.regions, self.regions))
        key = self.weight_key(region, filled)
        if filled is not None:
            key = key.masked_fill(~filled[:, None], 0)
        taps = self.weight_proj
        assert taps.bias is not None
        return kernel_logits(query, key, taps.weight, taps.bias, self.groups, self.scale)

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, height, width, _ = x.shape
        source, seen = self.fitted(to_channels_first(x), mask)
        logits = self.logits(source, seen)

        def core(values: Tensor) -> Tensor:
            blanked = values if mask is None else values.masked_fill(~mask[..., None, None], 0)
            fitted, _ = self.fitted(to_channels_first(blanked.flatten(-2)), mask)
            out = self._brought_back(self._convolve(fitted, logits, seen), seen, (height, width))
            return to_channels_last(out).unflatten(-1, (2 * self.groups, -1))

        return weights_of(core, x.new_zeros(batch, height, width, 2 * self.groups, 1))

    def _convolve(self, value: Tensor, logits: Tensor, seen: Tensor | None) -> Tensor:
        taps = self.smk_size**2
        near, far = value.chunk(2, dim=1)
        near = apply_kernels(near, logits[..., :taps], self.rpb1, seen)
        far = apply_kernels(far, logits[..., taps:], self.rpb2, seen)
        return torch.cat([near, far], 1)

    def _brought_back(self, out: Tensor, seen: Tensor | None, size: tuple[int, int]) -> Tensor:
        if size == out.shape[2:]:
            return out
        blanked = out if seen is None else out.masked_fill(~seen[:, None], 0)
        return average(blanked, seen, size)[0]

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, height, width = shape
        tokens, mixed = math.prod(shape), batch * math.prod(fitting_size((height, width), self.kernel_size))
        taps = self.smk_size**2 + self.kernel_size**2
        keys = batch * self.regions**2
        return [
            projection("gate", tokens, self.dim, self.dim),
            depthwise("static kernel", tokens, self.dim, self.kernel_size**2),
            projection("queries", mixed, self.dim, self.dim // 2),
            elementwise("regions", mixed * self.dim, tensors=1),
            projection("keys", keys, self.dim, self.dim // 2),
            Part("keys by taps", keys * taps * self.dim, batch * taps * self.dim / 2),
            projection("values", mixed, self.dim, self.dim),
            # Logits, and each half of the channels by its own kernel.
            Part("kernels", mixed * taps * (self.dim + 6 * self.groups), mixed * self.dim / 2),
            Part("windows", mixed * self.dim * taps, 2 * mixed * self.dim),
            projection("fusion", tokens, self.dim, self.dim),
            elementwise("squeeze and excitation, gate", tokens * self.dim, tensors=4, flops=4),
            projection("output", tokens, self.dim, self.dim),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a released block's state, the part that is the mixer."""
        around = ("dwconv1.", "dwconv2.", "norm1.", "norm2.", "mlp.", "ls1.", "ls2.")
        return {key: value for key, value in state.items() if not key.startswith(around)}


class SqueezeExcitation(nn.Module):
    """Channels weighted by two layers on the average of the real tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(16, dim // 8)
        # Numbered as in the released code, where the first entry pools.
        self.proj = nn.Sequential(
            nn.Identity(), nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weight (B, C, H, W)."""
        blanked = x if mask is None else x.masked_fill(~mask[:, None], 0)
        return x * self.proj(average(blanked, mask, (1, 1))[0])


def init_convolution(module: nn.Module) -> None:
    """Start a convolution as the released network does."""
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
