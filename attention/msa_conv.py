"""MSA-Conv: self-attention within the taps of a convolution, then the convolution.

Source: Zhang et al., TiC: Exploring Vision Transformer in Convolution, arXiv 2310.04134; only this operator of it was
released. Every token attends to the K x K (dilated) window centred on it; places beyond the map stay in the softmax
with score 0 and value 0, so that weights sum to less than 1 near a border. The input is added, and an ordinary K x K
convolution, not dilated, and ReLU follow. The release has one head over all channels, whatever its name. A masked
token is to its neighbours what a place beyond the map is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, depthwise, elementwise, projection
from attention.layout import split_qkv, to_channels_first, to_channels_last, weights_of
from attention.masking import blank
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from kernels.dynamic_conv import neighborhood_av, neighborhood_qk
from kernels.errors import InputError


class MSAConv2d(nn.Module):
    """The layer in the place of a convolution, with any number of output channels, stride and padding.

    Args:
        dim: channels C.
        out_dim: channels of the output.
        kernel_size: K, odd, of the window and of the convolution.
        stride, padding: of the convolution; K // 2 by default.
        dilation: distance between the taps of the window.
        bias: whether the convolution has one.
        num_heads: heads of the attention.
        attn_drop: dropout on the weights while training.

    Raises:
        InputError: a number is not possible.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        bias: bool = False,
        num_heads: int = 1,
        attn_drop: float = 0.1,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0 or dilation < 1:
            raise InputError(
                f"attention 'msa_conv': kernel_size={kernel_size} must be odd and dilation={dilation} at least 1, so "
                "that windows are centred."
            )
        if num_heads < 1 or dim % num_heads:
            raise InputError(f"attention 'msa_conv': dim={dim} is not divisible into num_heads={num_heads} heads.")
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.mlp = nn.Conv2d(
            dim, out_dim, kernel_size, stride, kernel_size // 2 if padding is None else padding, bias=bias
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, H', W', out_dim) of ``x`` (B, H, W, C); ``mask`` (B, H, W) is true for real tokens."""
        weights, v = self.attention(x, mask)
        x = blank(self.gather(weights, v).flatten(-2) + x, mask)
        return F.relu(to_channels_last(self.mlp(to_channels_first(x))))

    def attention(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights (B, H, W, heads, K K) of each token's window, and the values (B, H, W, heads, D)."""
        # Zeros where masked: the scores and values of places beyond the map.
        q, k, v = split_qkv(blank(self.qkv(x), mask), self.num_heads)
        scores = neighborhood_qk(q, k, self.kernel_size, dilation=self.dilation, padding="zero", heads_first=False)
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
        return self.attn_drop(weights).to(v.dtype), v

    def gather(self, weights: Tensor, v: Tensor) -> Tensor:
        """Sum of each window's values (B, H, W, heads, E)."""
        return neighborhood_av(weights, v, self.kernel_size, dilation=self.dilation, padding="zero", heads_first=False)

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The released 1 x 1 convolution to our linear layer."""
        state = {key.replace("qkv_conv.", "qkv."): value for key, value in state.items()}
        return {key: value.flatten(1) if key == "qkv.weight" else value for key, value in state.items()}


@register("msa_conv", kind="mixer")
class MSAConv(Mixer):
    """MSA-Conv: attention within a convolution's window, then that convolution and ReLU (TiC, Zhang et al. 2023).

    Args:
        dim: channels C.
        num_heads: heads of the attention; the released code has one.
        kernel_size: K, odd, of the window and of the convolution; P is the number of its taps.
        dilation: distance between the taps of the window.
        bias: whether the convolution has one.
        attn_drop: dropout on the weights while training.

    Raises:
        InputError: kernel or dilation are not possible.
    """

    about = About("Zhang et al. (TiC), 2023, 2310.04134", "O(N P)", "neighborhood_qk")
    rows_sum_to_one = False  # what lies beyond the map takes a share

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        kernel_size: int = 3,
        dilation: int = 1,
        bias: bool = False,
        attn_drop: Probability = 0.1,
    ) -> None:
        super().__init__(dim, num_heads)
        self.conv = MSAConv2d(
            dim, dim, kernel_size, dilation=dilation, bias=bias, num_heads=num_heads, attn_drop=attn_drop
        )

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        return self.conv(x, mask)

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Those of the attention alone; places beyond the map and masked ones hold the rest of a row."""
        weights, v = self.conv.attention(x, mask)
        hidden = None if mask is None else mask[..., None]
        return weights_of(lambda values: self.conv.gather(weights, blank(values, hidden)), v)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        tokens, taps = math.prod(shape), self.conv.kernel_size**2
        scores = tokens * self.num_heads * taps
        return [
            projection("q, k, v", tokens, self.dim, 3 * self.dim),
            Part("scores", 2 * tokens * self.dim * taps, 2 * tokens * self.dim + scores),
            elementwise("softmax", scores, flops=5),
            depthwise("attention", tokens, self.dim, taps),
            Part("convolution", 2 * tokens * self.dim**2 * taps, 2 * tokens * self.dim + self.dim**2 * taps),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The released layer's state to ours."""
        return {f"conv.{key}": value for key, value in MSAConv2d.checkpoint_filter(state).items()}
