"""Attention whose weights a token makes by itself, for all pairs of places in the patch around it.

Source: Yuan et al., VOLO: Vision Outlooker for Visual Recognition, TPAMI 2022, arXiv 2106.13112. Parameter names are
those of the released code. Masked tokens, and patches whose centres are all masked, are as if they were outside the
map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, elementwise, projection
from attention.layout import split_heads, to_channels_first, to_channels_last, weights_of
from attention.masking import blank
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from kernels.dynamic_conv import outlook
from kernels.errors import InputError


@register("outlook", kind="mixer")
class OutlookAttention(Mixer):
    """Outlook attention: each patch is mixed by weights from its centre, overlaps are summed (VOLO, Yuan et al. 2022).

    Places of a patch outside the map take their share of the softmax with values of 0, and sums of overlapping patches
    are not normalised, so that a token's weights do not sum to 1. K is the side of a patch.

    Args:
        dim: channels C; heads of the paper are 32 wide.
        num_heads: heads.
        kernel_size: side of a patch, odd.
        stride: tokens from one patch to the next, at most half a patch and its centre, so that every token is in one;
            weights are made from the average of the ``stride x stride`` tokens that begin at the centre, of those that
            are on the map.
        qkv_bias: whether the projection to values has a bias.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: the kernel is even, or the stride not possible.
    """

    about = About("Yuan et al. (VOLO), TPAMI 2022, 2106.13112", "O(N K^4)", "dynamic_conv", "Apache-2.0")
    rows_sum_to_one = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 3,
        stride: int = 2,
        qkv_bias: bool = False,
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(
                f"attention 'outlook': kernel_size={kernel_size} must be odd, so that patches are centred."
            )
        if not 1 <= stride <= kernel_size // 2 + 1:
            raise InputError(
                f"attention 'outlook': stride={stride} must be from 1 to {kernel_size // 2 + 1} for "
                f"kernel_size={kernel_size}, or some tokens are in no patch."
            )
        self.kernel_size, self.stride = kernel_size, stride
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn = nn.Linear(dim, kernel_size**4 * num_heads)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        values = split_heads(blank(self.v(x), mask), self.num_heads)
        return self.proj_drop(self.proj(self._core(x, mask)(values).flatten(-2)))

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        core = self._core(x, mask)
        shaped = split_heads(x, self.num_heads)
        if mask is None:
            return weights_of(core, shaped)
        return weights_of(lambda values: core(values * mask[..., None, None]), shaped)

    def _core(self, x: Tensor, mask: Tensor | None) -> Callable[[Tensor], Tensor]:
        """What maps values (B, H, W, heads, E), 0 where masked, to outputs."""
        centres, present = self._centres(x, mask)
        places = self.kernel_size**2
        scores = self.attn(centres).unflatten(-1, (self.num_heads, places, places)).movedim(3, 1) * self.head_dim**-0.5
        shares = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        if present is not None:
            shares = shares.masked_fill(~present[:, None, ..., None, None], 0)

        def core(values: Tensor) -> Tensor:
            mixed = outlook(shares.to(values.dtype), values.movedim(3, 1), self.kernel_size, stride=self.stride)
            return mixed.movedim(1, 3)

        return core

    def _centres(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Averages (B, h, w, C) of the real tokens at the centre of each patch, and whether there are any."""
        if self.stride == 1:
            return x, mask
        mean = self._average(x)
        if mask is None:
            return mean, None
        share = self._average(mask[..., None].to(x.dtype))
        return mean / share.masked_fill(share == 0, 1), share[..., 0] > 0

    def _average(self, x: Tensor) -> Tensor:
        return to_channels_last(F.avg_pool2d(to_channels_first(x), self.stride, ceil_mode=True))

    def cost(self, shape: Sequence[int]) -> list[Part]:
        tokens, places = math.prod(shape), self.kernel_size**2
        patches = shape[0] * math.prod(-(-n // self.stride) for n in shape[1:])
        logits = patches * self.num_heads * places**2
        return [
            projection("v", tokens, self.dim, self.dim),
            elementwise("averages", tokens * self.dim, 1),
            projection("weights", patches, self.dim, self.num_heads * places**2),
            elementwise("softmax", logits, 2, 4),
            Part("mixing", 2 * patches * places**2 * self.dim, logits + 2 * tokens * self.dim),
            projection("output", tokens, self.dim, self.dim),
        ]
