"""Attention within windows of tokens, and attention between the channels of all tokens, in turns.

Source: Ding et al., DaViT: Dual Attention Vision Transformers, ECCV 2022, arXiv 2204.03645. ``version=2`` of the
channel attention is that of Florence-2 (Xiao et al., CVPR 2024, arXiv 2311.06242). The released code's names rotate
relative to the paper's: its first version reads keys and values for the scores and weighs queries, which is what is
computed here. In the paper the two are attentions of alternating blocks (``part="alternate"``, :class:`DualBlock`); as
one mixer, with ``part="both"``, the second takes the output of the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attention.about import About
from attention.block_parts import ConditionalPosition, DropPath, Mlp
from attention.cost import Part, linear_attention, projection
from attention.layout import split_qkv
from attention.masking import blank
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from attention.window import WindowAttention
from kernels.errors import InputError, unknown_name
from kernels.linear_attention import channel_attention
from kernels.segment import segment_ids, segment_lengths

PARTS = ("both", "window", "channel", "alternate")
_ABOUT = About("Ding et al. (DaViT), ECCV 2022, 2204.03645", "O(N P)", "linear_attention_2pass", "MIT")


class ChannelGroupAttention(Mixer):
    """Softmax attention between the channels of a group, over all tokens (DaViT, Ding et al. 2022).

    With matrices of tokens by the D channels of a group, the output's transpose is ``softmax(D^-0.5 K^T V) Q^T``, or
    in version 2 ``softmax(N^-0.5 Q^T K) V^T``. Masked tokens are in neither product nor in N.

    Args:
        dim: channels C.
        num_heads: groups.
        version: 1 or 2. The scores of version 1 grow with the number of tokens.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: another version.
    """

    name = "dual_window_channel"
    about = _ABOUT
    grids = (1, 2, 3)
    has_weights = False

    def __init__(
        self, dim: int, num_heads: int, version: int = 1, qkv_bias: bool = True, proj_drop: float = 0.0
    ) -> None:
        super().__init__(dim, num_heads)
        if version not in (1, 2):
            raise InputError(f"attention 'dual_window_channel': version={version} must be 1 (DaViT) or 2 (Florence-2).")
        self.version = version
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x.flatten(1, -2)), self.num_heads)
        scale = None
        if mask is not None:
            real = mask.flatten(1)
            k = k.masked_fill(~real[..., None, None], 0)
            if self.version == 2:
                count = real.sum(1).clamp_min(1).to(torch.promote_types(x.dtype, torch.float32))
                k, scale = (k * count.rsqrt()[:, None, None, None]).to(k.dtype), 1.0
        out = channel_attention(q, k, v, query_of_key=self.version == 2, scale=scale)
        return self.proj_drop(self.proj(out.flatten(2))).view(x.shape)

    def packed(self, x: Tensor, cu_seqlens: Tensor, shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        scale = None
        if self.version == 2:
            count = segment_lengths(cu_seqlens).clamp_min(1).to(torch.promote_types(x.dtype, torch.float32))
            each = count.rsqrt()[segment_ids(cu_seqlens, len(x))]
            k, scale = (k * each[:, None, None]).to(k.dtype), 1.0
        out = channel_attention(q, k, v, query_of_key=self.version == 2, scale=scale, cu_seqlens=cu_seqlens)
        return self.proj_drop(self.proj(out.flatten(1)))

    def cost(self, shape: Sequence[int]) -> list[Part]:
        tokens = math.prod(shape)
        return [
            projection("channels: q, k, v", tokens, self.dim, 3 * self.dim),
            linear_attention("channels: attention", tokens, self.dim, self.head_dim),
            projection("channels: output", tokens, self.dim, self.dim),
        ]


@register("dual_window_channel", kind="mixer")
class DualWindowChannelAttention(Mixer):
    """Softmax attention within windows, then between channels over all tokens (DaViT, Ding et al. 2022).

    There are no weights between tokens where channels attend to each other; those of the windows are to be had from
    the ``window`` of the module, an :class:`attention.window.WindowAttention`.

    Args:
        dim: channels C.
        num_heads: heads of the windows and groups of the channels.
        part: ``"both"``, one after the other; ``"window"`` or ``"channel"`` alone; ``"alternate"``: windows in the even
            blocks of a stage and channels in the odd ones, as in the paper. Sequences and volumes need ``"channel"``.
        window_size: side of a window, or (height, width); P is the number of its tokens.
        version: of the channel attention, see :class:`ChannelGroupAttention`.
        padding: of windows that stick out of the map, see :class:`attention.window.WindowAttention`.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        proj_drop: dropout on the output of each part while training.

    Raises:
        InputError: a parameter is not possible.
    """

    about = _ABOUT
    grids: tuple[int, ...] = (2,)
    has_weights = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        part: str = "both",
        window_size: int | Sequence[int] = 7,
        version: int = 1,
        padding: str = "released",
        qkv_bias: bool = True,
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        if part not in PARTS:
            raise unknown_name("attention.part", part, PARTS)
        self.window: WindowAttention | None = None
        self.channel: ChannelGroupAttention | None = None
        if part != "channel":
            self.window = _window(dim, num_heads, window_size, padding, qkv_bias, proj_drop)
        if part in ("both", "channel"):
            self.channel = ChannelGroupAttention(dim, num_heads, version, qkv_bias, proj_drop)
        if part == "channel":
            self.grids = ChannelGroupAttention.grids

    @classmethod
    def for_block(cls, params: Mapping[str, Any], index: int) -> dict[str, Any]:
        chosen = dict(params)
        if chosen.get("part") == "alternate":
            chosen["part"] = "channel" if index % 2 else "window"
        return chosen

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        for part in (self.window, self.channel):
            if part is not None:
                x = part(x, mask)
        return x

    def packed(self, x: Tensor, cu_seqlens: Tensor, shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        if self.channel is not None and self.window is None:
            return self.channel.packed(x, cu_seqlens, shapes)
        return super().packed(x, cu_seqlens, shapes)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        return [step for part in (self.window, self.channel) if part is not None for step in part.cost(shape)]


class DualBlock(nn.Module):
    """DaViT's block: position, attention of one of the two kinds, position again, MLP, each added to the map.

    Parameters have the names of timm's code.

    Args:
        dim: channels C.
        num_heads: heads, or groups.
        part: ``"window"`` or ``"channel"``.
        window_size, padding: of the windows.
        version: of the channel attention.
        mlp_ratio: hidden channels of the MLP per channel.
        qkv_bias, proj_drop: of the attention.
        drop_path: probability of leaving out a branch of an item while training.

    Raises:
        InputError: another part, or a parameter is not possible.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        part: str,
        window_size: int | Sequence[int] = 7,
        version: int = 1,
        padding: str = "released",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if part not in ("window", "channel"):
            raise unknown_name("block's part", part, ("window", "channel"))
        self.cpe1 = ConditionalPosition(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn: Mixer
        if part == "window":
            self.attn = _window(dim, num_heads, window_size, padding, qkv_bias, proj_drop)
        else:
            self.attn = ChannelGroupAttention(dim, num_heads, version, qkv_bias, proj_drop)
        self.cpe2 = ConditionalPosition(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, H, W, C) to the same; ``mask`` (B, H, W) is true for real tokens, the others come out as 0."""
        x = self.cpe1(x, mask)
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        x = self.cpe2(x, mask)
        return blank(x + self.drop_path(self.mlp(self.norm2(x))), mask)

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """State of the authors' code, and of L2ViT's window blocks, which number the two positions in a list."""
        return {key.replace("cpe.0.", "cpe1.").replace("cpe.1.", "cpe2."): value for key, value in state.items()}


def _window(
    dim: int, num_heads: int, window_size: int | Sequence[int], padding: str, qkv_bias: bool, proj_drop: float
) -> WindowAttention:
    return WindowAttention(
        dim,
        num_heads,
        window_size,
        shift=0,
        relative_bias=False,
        qkv_bias=qkv_bias,
        padding=padding,
        proj_drop=proj_drop,
    )
