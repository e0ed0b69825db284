"""Linear global attention with a floor under its normaliser, and the local concentration module that goes with it.

Source: Zheng, The Linear Attention Resurrection in Vision Transformer (L2ViT), arXiv 2501.16182, 2025. The floor of 100
is a constant of the paper: short sequences and small features stay below it, and are then not normalised but divided
by 100. The window blocks between the paper's global blocks are
:class:`attention.dual_window_channel.DualBlock` with ``part="window"``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.block_parts import ConditionalPosition, DropPath, Mlp, depthwise
from attention.cost import Part, elementwise, linear_attention, projection
from attention.cost import depthwise as depthwise_cost
from attention.layout import split_qkv, weights_of
from attention.masked_norm import masked_batch_norm
from attention.masking import blank
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from kernels.errors import InputError
from kernels.linear_attention import linear_attention_2pass


@register("linear_l2", kind="mixer")
class LinearGlobalAttention(Mixer):
    """Linear attention of ReLU features, its normaliser kept above a floor (L2ViT, Zheng 2025).

    With q = relu(query), k = relu(key): ``out_i = t q_i sum_j k_j v_j^T / max(q_i . sum_j k_j, floor)``, t learned for
    each head.

    Args:
        dim: channels C.
        num_heads: heads.
        floor: below the normaliser, above 0.
        local_kernel: None, or the odd side of the kernels of a :class:`LocalConcentration` whose output, from the
            attention's normalised output, is added to it. The paper has it in the block, with a residual connection of
            its own (:class:`GlobalBlock`). It works within images and within the slices of volumes; sequences go
            without.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: the floor or the kernel is not possible.
    """

    about = About("Zheng (L2ViT), 2025, 2501.16182", "O(N)", "linear_attention_2pass", "MIT")
    grids = (1, 2, 3)
    rows_sum_to_one = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        floor: float = 100.0,
        local_kernel: int | None = None,
        qkv_bias: bool = True,
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        if not floor > 0:
            raise InputError(f"attention 'linear_l2': floor={floor} must be above 0, such as the paper's 100.")
        self.floor = float(floor)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), self.head_dim**-0.5))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.local_norm = None if local_kernel is None else nn.LayerNorm(dim)
        self.local_mp = None if local_kernel is None else LocalConcentration(dim, local_kernel)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x.flatten(1, -2)), self.num_heads)
        out = self.proj_drop(self.proj(self._core(q, k, v, mask).flatten(2))).view(x.shape)
        if self.local_mp is None or self.local_norm is None or x.dim() < 4:
            return out
        return out + self.local_mp(self.local_norm(out), mask)

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Of the attention; what the local concentration module adds is not in them."""
        q, k, v = split_qkv(self.qkv(x.flatten(1, -2)), self.num_heads)
        return weights_of(lambda values: self._core(q, k, values, mask), v)

    def _core(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        return linear_attention_2pass(
            q,
            k,
            v,
            normaliser="l2vit",
            feature_map="relu",
            eps=self.floor,
            key_weight=None if mask is None else mask.flatten(1)[..., None],
            query_weight=self.temperature.view(1, -1),
            cu_seqlens=cu_seqlens,
        )

    def packed(self, x: Tensor, cu_seqlens: Tensor, shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        if self.local_mp is not None and shapes is not None:
            return super().packed(x, cu_seqlens, shapes)
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        return self.proj_drop(self.proj(self._core(q, k, v, cu_seqlens=cu_seqlens).flatten(1)))

    def cost(self, shape: Sequence[int]) -> list[Part]:
        tokens = math.prod(shape)
        parts = [
            projection("q, k, v", tokens, self.dim, 3 * self.dim),
            linear_attention("attention", tokens, self.dim, self.head_dim),
            projection("output", tokens, self.dim, self.dim),
        ]
        if self.local_mp is not None and len(shape) > 2:
            parts += [elementwise("norm", tokens * self.dim, flops=8), *self.local_mp.cost(tokens)]
        return parts


class LocalConcentration(nn.Module):
    """Two depthwise convolutions with GELU and batch norm between them: each token gathers its surroundings.

    Of maps (B, H, W, C), and of each slice of volumes (B, D, H, W, C). Masked tokens are zeros to both convolutions
    and no part of the statistics.

    Args:
        dim: channels C.
        kernel_size: odd side of the kernels.

    Raises:
        InputError: the side is even or less than 1.
    """

    def __init__(self, dim: int, kernel_size: int = 7) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(
                f"local concentration: kernel size {kernel_size} must be odd and at least 1, such as the paper's 7."
            )
        self.conv1 = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.bn = nn.BatchNorm1d(dim)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out = F.gelu(depthwise(blank(x, mask), self.conv1.weight, self.conv1.bias))
        out = blank(masked_batch_norm(self.bn, out, mask, channel=-1), mask)
        return blank(depthwise(out, self.conv2.weight, self.conv2.bias), mask)

    def cost(self, tokens: float) -> list[Part]:
        """Of a map with so many tokens in all."""
        dim, taps = self.bn.num_features, math.prod(self.conv1.kernel_size)
        return [
            depthwise_cost("first local convolution", tokens, dim, taps),
            elementwise("GELU and batch norm", tokens * dim, flops=10),
            depthwise_cost("second local convolution", tokens, dim, taps),
        ]


class GlobalBlock(nn.Module):
    """L2ViT's block of linear global attention: position, attention, local concentration, MLP, each added to the map.

    Parameters have the names of the released code.

    Args:
        dim: channels C.
        num_heads: heads.
        mlp_ratio: hidden channels of the MLP per channel.
        kernel_size: of the local concentration module.
        floor, qkv_bias, proj_drop: of the attention.
        drop_path: probability of leaving out a branch of an item while training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        kernel_size: int = 7,
        floor: float = 100.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([ConditionalPosition(dim)])
        self.norm1 = nn.LayerNorm(dim)
        self.attn = LinearGlobalAttention(dim, num_heads, floor, qkv_bias=qkv_bias, proj_drop=proj_drop)
        self.norm3 = nn.LayerNorm(dim)
        self.local_mp = LocalConcentration(dim, kernel_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, H, W, C) to the same; ``mask`` (B, H, W) is true for real tokens, the others come out as 0."""
        x = self.cpe[0](x, mask)
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        x = x + self.drop_path(self.local_mp(self.norm3(x), mask))
        return blank(x + self.drop_path(self.mlp(self.norm2(x))), mask)
