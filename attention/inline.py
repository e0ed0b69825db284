"""InLine attention: linear attention whose weights sum to 1 by subtraction instead of division.

Source: Han et al., Bridging the Divide: Reconsidering Softmax and Linear Attention, NeurIPS 2024, arXiv 2412.06590.
The released code's ``attn_drop`` and ``window`` do nothing and are not here, nor is the pyramid form with reduced keys,
which cannot run there. On volumes and sequences, of which the paper does not speak, the local term follows
``local_axes``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attention.about import About
from attention.block_parts import depthwise_each
from attention.cost import Part, depthwise, linear_attention, projection
from attention.layout import split_qkv, weights_of
from attention.masking import blank
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from kernels.errors import InputError, unknown_name
from kernels.linear_attention import linear_attention_2pass

# Each feature map's name in the operator, and its slope there.
FEATURES: dict[str, tuple[str, float | None]] = {
    "identity": ("identity", None),
    "relu": ("relu", None),
    "leaky_relu": ("leaky_relu", 0.01),
    "exp": ("exp", 0.2),
}


@register("inline", kind="mixer")
class InLineAttention(Mixer):
    """Linear attention with injective weights and a local term made from the map's mean (InLine, Han et al. 2024).

    With features f of queries and g of keys: ``out_i = (s / N) f_i sum_j g_j v_j^T + (1 - s f_i . mean g) mean v``,
    s = D^-0.5, so that a token's weights sum to 1 (some may be negative). To it is added a depthwise convolution of the
    values whose kernels, with 3 taps on each axis, two grouped layers make from the mean token of each item.

    Args:
        dim: channels C.
        num_heads: heads.
        phi: feature map, ``"identity"``, ``"relu"``, ``"leaky_relu"`` (0.01 below 0) or ``"exp"`` (of 0.2 x).
        local_axes: how many of the last axes of a grid the local term reaches over, 0 to 3: with 2, images and the
            slices of volumes have it. Grids of fewer axes go without; 0 leaves it out.
        prefix_tokens: tokens in front of the N of a sequence that are no part of the map, such as a class token: the
            rest is a square image, and the local term passes them by. Takes sequences only then.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: a parameter is not possible, or a sequence with prefix tokens is no square image.
    """

    about = About("Han et al. (InLine), NeurIPS 2024, 2412.06590", "O(N)", "linear_attention_2pass")
    grids: tuple[int, ...] = (1, 2, 3)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        phi: str = "identity",
        local_axes: int = 2,
        prefix_tokens: int = 0,
        qkv_bias: bool = True,
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        if phi not in FEATURES:
            raise unknown_name("attention.phi", phi, FEATURES)
        if local_axes not in (0, 1, 2, 3):
            raise InputError(f"attention 'inline': local_axes={local_axes} must be 0 (no local term), 1, 2 or 3.")
        if prefix_tokens < 0 or (prefix_tokens > 0 and local_axes not in (0, 2)):
            raise InputError(
                f"attention 'inline': prefix_tokens={prefix_tokens} must not be negative, and goes with local_axes 2 "
                f"or 0, not {local_axes}."
            )
        self.phi = phi
        self.local_axes = local_axes
        self.prefix_tokens = prefix_tokens
        if prefix_tokens:
            self.grids = (1,)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.residual = kernel_maker(dim, num_heads, 3**local_axes) if local_axes else None

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x.flatten(1, -2)), self.num_heads)
        out = inline_core(q, k, v, self.phi, mask).flatten(2)
        if self.residual is not None and self._map_of(x.shape[1:-1]) is not None:
            out = out + self._local(self.residual, x, v.flatten(2), mask)
        return self.proj_drop(self.proj(out)).view(x.shape)

    def _map_of(self, grid: Sequence[int]) -> tuple[int, ...] | None:
        """The grid that the local term works on, None where there is no local term."""
        if not self.prefix_tokens:
            return tuple(grid) if 0 < self.local_axes <= len(grid) else None
        if not self.local_axes:
            return None
        patches = grid[0] - self.prefix_tokens
        side = math.isqrt(max(patches, 0))
        if patches < 1 or side**2 != patches:
            raise InputError(
                f"attention 'inline': {grid[0]} tokens less prefix_tokens={self.prefix_tokens} are no square image; "
                "take images with prefix_tokens=0, or local_axes=0."
            )
        return side, side

    def _local(self, maker: nn.Sequential, x: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The local term (B, N, C) for values (B, N, C)."""
        precise = torch.promote_types(x.dtype, torch.float32)
        total = x.flatten(1, -2).sum(1, dtype=precise)  # masked tokens are 0 in it
        if mask is None:
            mean = total / x.shape[1:-1].numel()
        else:
            v = blank(v, mask.flatten(1))
            mean = total / mask.flatten(1).sum(1, keepdim=True).clamp_min(1)
        grid = self._map_of(x.shape[1:-1])
        assert grid is not None
        kernels = local_kernels(maker, mean.to(x.dtype), self.local_axes)
        local = depthwise_each(v[:, self.prefix_tokens :].unflatten(1, grid), kernels).flatten(1, -2)
        return nn.functional.pad(local, (0, 0, self.prefix_tokens, 0))

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Of the attention; what the local term adds is not in them."""
        q, k, v = split_qkv(self.qkv(x.flatten(1, -2)), self.num_heads)
        return weights_of(lambda values: inline_core(q, k, values, self.phi, mask), v)

    def packed(self, x: Tensor, cu_seqlens: Tensor, shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        if self.residual is not None and (shapes is not None or self.local_axes == 1 or self.prefix_tokens):
            return super().packed(x, cu_seqlens, shapes)
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        out = inline_core(q, k, v, self.phi, cu_seqlens=cu_seqlens)
        return self.proj_drop(self.proj(out.flatten(1)))

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, *grid = shape
        tokens = batch * math.prod(grid)
        parts = [
            projection("q, k, v", tokens, self.dim, 3 * self.dim),
            linear_attention("attention", tokens, self.dim, self.head_dim),
            projection("output", tokens, self.dim, self.dim),
        ]
        if self.residual is not None and self._map_of(grid) is not None:
            taps = 3**self.local_axes
            mean = Part("mean token", tokens * self.dim, (tokens + batch) * self.dim)
            maker = projection("local kernels", batch, self.head_dim, (1 + taps) * self.dim)
            parts += [mean, maker, depthwise("local term", tokens, self.dim, taps)]
        return parts

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state; the pyramid form has the projection in two parts."""
        for part in ("weight", "bias"):
            if f"q.{part}" in state and f"kv.{part}" in state:
                state[f"qkv.{part}"] = torch.cat([state.pop(f"q.{part}"), state.pop(f"kv.{part}")])
        return state


def inline_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi: str = "identity",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """InLine attention of (B, N, heads, D), or packed (T, heads, D), without projections and local term.

    Args:
        phi: see :class:`InLineAttention`.
        mask: (B, *grid) with N tokens.
        cu_seqlens: boundaries of packed sequences.
    """
    feature_map, slope = FEATURES[phi]
    return linear_attention_2pass(
        q,
        k,
        v,
        normaliser="inline",
        feature_map=feature_map,
        slope=slope,
        key_weight=None if mask is None else mask.flatten(1)[..., None],
        cu_seqlens=cu_seqlens,
    )


def kernel_maker(dim: int, num_heads: int, taps: int) -> nn.Sequential:
    """The layers, grouped by heads, that make kernels of so many taps from a mean token; see :func:`local_kernels`."""
    return nn.Sequential(
        nn.Conv1d(dim, dim, 1, groups=num_heads), nn.GELU(), nn.Conv1d(dim, taps * dim, 1, groups=num_heads)
    )


def local_kernels(maker: nn.Sequential, mean: Tensor, axes: int = 2) -> Tensor:
    """Kernels (B, C, 3, ...), with 3 taps on each of the ``axes``, from mean tokens (B, C)."""
    batch, dim = mean.shape
    first = maker[0]
    assert isinstance(first, nn.Conv1d)
    heads = first.groups
    taps = mean.unflatten(1, (heads, -1)).transpose(0, 1)  # (heads, B, C / heads)
    for layer in maker:
        if isinstance(layer, nn.Conv1d):  # one product for all heads; a convolution takes its groups one by one
            assert layer.bias is not None
            weight = layer.weight.view(heads, -1, dim // heads)
            taps = torch.baddbmm(layer.bias.view(heads, 1, -1), taps, weight.mT)
        else:
            taps = layer(taps)
    return taps.transpose(0, 1).reshape(batch, dim, *[3] * axes)
