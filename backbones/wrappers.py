"""What stands between a mixer of maps (B, H, W, C) and a block that hands its tokens over in another form."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import checkpoint
from timm.models.davit import SpatialBlock
from timm.models.gcvit import GlobalContextVitBlock
from timm.models.maxxvit import PartitionAttention2d, PartitionAttentionCl
from timm.models.metaformer import MetaFormerStage
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from torch import Tensor, nn

from attention.layout import to_channels_first, to_channels_last
from kernels.errors import InputError


class ChannelsFirst(nn.Module):
    """A mixer on maps (B, C, H, W)."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return to_channels_first(self.mixer(to_channels_last(x))).contiguous()


class Sized(nn.Module):
    """A mixer on sequences (B, H * W, C) whose block says their size."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.mixer(x.unflatten(1, (int(size[0]), int(size[1])))).flatten(1, 2)


class Grid:
    """The patch grid of a vision transformer's current image, which its blocks are not told."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def watch(self, embed: nn.Module) -> None:
        """Follow the images that the patch embedding is given, whatever their size."""
        hooks = embed._forward_pre_hooks.values()
        if not any(getattr(hook, "__self__", None) is self for hook in hooks):
            embed.register_forward_pre_hook(self.see)

    def see(self, embed: Any, inputs: tuple[Tensor, ...]) -> None:
        height, width = inputs[0].shape[-2:]
        self.shape = embed.dynamic_feat_size((height, width))


class Patches(nn.Module):
    """A mixer on the patch tokens of a vision transformer, on their grid, and a cross attention for the others.

    Tokens (B, P + H * W, C) in and out, the first P of them class, distillation or register tokens. These read all
    tokens, themselves included, by ``reader``; the patch tokens are mixed among themselves and do not see them. Of what
    a block says of positions (rotary embeddings, shared biases) nothing is used.
    """

    def __init__(self, mixer: nn.Module, grid: Grid, prefix: int, reader: nn.Module | None) -> None:
        super().__init__()
        self.mixer = mixer
        self.reader = reader
        self.grid = grid
        self.prefix = prefix

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **positions: object
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise InputError("a replaced attention takes no attention mask and is not causal; leave both out.")
        height, width = self.grid.shape
        if x.shape[1] != self.prefix + height * width:
            raise InputError(
                f"{x.shape[1] - self.prefix} patch tokens do not fill the grid of {height} x {width}; a replaced "
                "attention needs every patch (patch_drop_rate=0)."
            )
        mixed = self.mixer(x[:, self.prefix :].unflatten(1, (height, width))).flatten(1, 2)
        return mixed if self.reader is None else torch.cat((self.reader(x[:, : self.prefix], x), mixed), dim=1)


class _Unwindowed:
    """What Swin blocks have in common once their mixer sees the whole map (B, H, W, C)."""

    attn: Any
    input_resolution: Any

    def _attn(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def set_input_size(self, feat_size: tuple[int, int], *_: Any, **__: Any) -> None:
        self.input_resolution = feat_size


class MixingSwinBlock(_Unwindowed, SwinTransformerBlock):
    """A Swin block without windows."""


class MixingSwinV2Block(_Unwindowed, SwinTransformerV2Block):
    """A Swin V2 block without windows."""


class MixingSwinV2CrBlock(_Unwindowed, SwinTransformerV2CrBlock):
    """A block of timm's other Swin V2 without windows."""

    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        return self.attn(x)


class _Unpartitioned:
    """What MaxViT's two attention blocks have in common once their mixer sees the whole map."""

    attn: Any
    partition_size: Any

    def _partition_attn(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def set_partition_size(self, partition_size: tuple[int, int]) -> None:
        self.partition_size = partition_size


class MixingPartitionCl(_Unpartitioned, PartitionAttentionCl):
    """MaxViT's block or grid attention without partition, maps (B, H, W, C)."""


class MixingPartition2d(_Unpartitioned, PartitionAttention2d):
    """MaxViT's block or grid attention without partition, maps (B, C, H, W)."""


class MixingGlobalContextBlock(GlobalContextVitBlock):
    """A GC ViT block without windows and without global queries."""

    def _window_attn(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        return self.attn(x)


class MixingSpatialBlock(SpatialBlock):
    """A spatial block of DaViT without windows, maps (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        x = to_channels_last(self.cpe1(x))
        mixed = self.attn(self.norm1(x))
        x = to_channels_first(x + (mixed if self.drop_path1 is None else self.drop_path1(mixed)))
        x = self.cpe2(x)
        if self.mlp is None:
            return x
        assert self.norm2 is not None
        x = to_channels_last(x)
        return to_channels_first(x + self.drop_path2(self.mlp(self.norm2(x)))).contiguous()


class MixingMetaFormerStage(MetaFormerStage):
    """A MetaFormer stage whose blocks took sequences and now take maps (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        # A map goes through the sequence's norms, MLPs and scales unchanged: all of them work on the last axis.
        x = to_channels_last(self.downsample(x))
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return to_channels_first(x).contiguous()
