"""How images of any size go through a network: what each family is given, and how that is found out.

| family | images of any size by |
|---|---|
| most convolutional pyramids, DaViT, PVT v2, XCiT, MViT v2, our own | nothing: they are as timm has them |
| ConvNeXt, FocalNet, Twins, VGG, ... (whose downsampling rounds down) | zeros right and below, up to their stride |
| ViT, DeiT, EVA, hybrid ViT | ``dynamic_img_size``: position embeddings are resampled; zeros up to the patch |
| Swin, Swin V2 (both) | ``strict_img_size=False``: masks follow the image; zeros up to the patch of 4 |
| MaxViT | maps are padded to windows and grids inside each block |
| GC ViT | as in its dense version: windows are padded inside each block, the global query is resized to the window |
| HaloNet | maps are padded to blocks inside each attention |
| VOLO | the position embedding is resampled for each image; zeros up to 16 |
| CrossViT | both grids grow with the image at the scale they were built for; position embeddings are resampled |
| Inception and others without padding at borders | maps are resized to ceil(size / stride) |
| other networks of one size (BEiT, CaiT, CoAtNet, MLP-Mixer, ...) | the image is resized to that size, the maps back |

What is padded inside a block is padded after the norm and before the projection; it is attended to, as in the
published dense versions of Swin, DaViT and GC ViT. Images of the size a network is built for give timm's numbers.
Which of the rows holds is measured on two small images when a pyramid is built, so that it holds for new networks too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.halo_attn import HaloAttn
from timm.layers.pos_embed import resample_abs_pos_embed, resample_abs_pos_embed_nhwc
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.crossvit import CrossVit, scale_image
from timm.models.eva import Eva
from timm.models.gcvit import GlobalContextVit, GlobalContextVitBlock, GlobalContextVitStage
from timm.models.maxxvit import ParallelPartitionAttention, PartitionAttention2d, PartitionAttentionCl
from timm.models.vision_transformer import VisionTransformer
from timm.models.volo import VOLO
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.errors import InputError

LEAST = 32
"""The smallest side of an image that a pyramid takes."""
# All of the sizes these pass through on the way to stride 64 are odd: where rounding matters, it matters here.
_PROBES = ((65, 97), (97, 65))
Stride = int | float


@dataclass(frozen=True)
class Sizing:
    """What happens to an image on its way in and to the maps on their way out.

    Attributes:
        divisor: images are padded with zeros, right and below, until this divides their sides.
        least: and until their sides are at least this.
        size: images are resized to this (height, width) instead, and maps back.
        resamples: maps are resized to the size they should have.
    """

    divisor: int = 1
    least: int = LEAST
    size: tuple[int, int] | None = None
    resamples: bool = False

    def prepare(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) as the network takes them."""
        height, width = x.shape[-2:]
        if self.size is not None:
            if (height, width) == self.size:
                return x
            return F.interpolate(x, self.size, mode="bilinear", antialias=True, align_corners=False)
        right, below = (max(self.least, _up(n, self.divisor)) - n for n in (width, height))
        return F.pad(x, (0, right, 0, below)) if right or below else x

    def fit(self, y: Tensor, stride: Stride, image: Sequence[int], given: Sequence[int]) -> Tensor:
        """A map of ``image`` (height, width), as it went in, for the image that was ``given``: contiguous."""
        rows, columns = cells(given[0], stride), cells(given[1], stride)
        if self.size is not None or self.resamples:
            of = given if self.size is not None else image
            wanted = cells(of[0], stride), cells(of[1], stride)
            if tuple(y.shape[-2:]) != wanted:
                y = F.interpolate(y, wanted, mode="bilinear", align_corners=False)
        return y[..., :rows, :columns].contiguous()


def cells(side: int, stride: Stride) -> int:
    """ceil(side / stride), whatever the rounding of a stride that is no whole number."""
    return -(-side // stride) if isinstance(stride, int) else math.ceil(side / stride - 1e-6)


def strides_of(model: nn.Module, reductions: Sequence[int], indices: Sequence[int]) -> tuple[Stride, ...]:
    """Strides of the maps ``indices``, as they are and not rounded as timm has those of CrossViT."""
    if not isinstance(model, CrossVit):
        return tuple(reductions)
    exact = [model.img_size[0] / _built_grid(model, i // model.num_feature_blocks)[0] for i in indices]
    return tuple(int(stride) if stride == int(stride) else stride for stride in exact)


def adapt(model: nn.Module) -> None:
    """Let the blocks of ``model`` take maps of any size, in place; what they compute at their own size stays.

    The classes of modules change, their parameters and the names of these do not.
    """
    for module in model.modules():
        swapped = _SWAPS.get(type(module))
        if swapped is not None:
            module.__class__ = swapped
    if isinstance(model, GlobalContextVit) and len(model.stages) > 2:
        stage: Any = model.stages[2]
        # The dense version halves the third stage's map once more for its query, unless it is one window.
        stage.halves_query = not any(isinstance(part, nn.MaxPool2d) for part in stage.global_block.modules())


def positions(model: nn.Module, size: Sequence[int]) -> dict[str, Tensor]:
    """Parameters that an image of ``size`` (height, width) asks for in place of the model's own."""
    if not isinstance(model, VOLO) or model.pos_embed is None:
        return {}
    stride = 8 * model.pooling_scale
    grid = [size[0] // stride, size[1] // stride]
    if list(model.pos_embed.shape[1:3]) == grid:
        return {}
    return {"pos_embed": resample_abs_pos_embed_nhwc(model.pos_embed, grid)}


def measure(run: Any, model: nn.Module, strides: Sequence[Stride], in_chans: int) -> Sizing:
    """How images of any size get through ``run``, which gives the maps of ``model``.

    Raises:
        InputError: there is no way that is known here.
    """
    sample = next(model.parameters())
    if isinstance(model, VisionTransformer | Eva) and getattr(model, "dynamic_img_size", False):
        patch: Any = model.patch_embed.patch_size
        if math.lcm(*map(int, patch)) == strides[0]:  # true of all but those behind a convolutional network
            return Sizing(int(strides[0]))

    def shapes(height: int, width: int) -> list[tuple[int, ...]] | None:
        try:
            return [tuple(y.shape) for y in run(sample.new_zeros(1, in_chans, height, width))]
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, ZeroDivisionError):
            return None

    def gives(height: int, width: int, exactly: bool) -> bool:
        found = shapes(height, width)
        if found is None or any(len(shape) != 4 for shape in found):
            return False
        wanted = [(cells(height, stride), cells(width, stride)) for stride in strides]
        return not exactly or [shape[-2:] for shape in found] == wanted

    def gives_all(divisor: int, least: int, exactly: bool) -> bool:
        sides = {tuple(max(least, _up(n, divisor)) for n in size) for size in (*_PROBES, (LEAST, LEAST))}
        return all(gives(height, width, exactly) for height, width in sorted(sides, reverse=True))

    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            steps = [*dict.fromkeys([1, *sorted(int(stride) for stride in strides), 32, 64])]
            for divisor in steps:
                if gives_all(divisor, LEAST, True):
                    return Sizing(divisor)
            if sample.device.type == "meta":  # some networks cannot be run without numbers
                return Sizing(max(32, *map(int, strides)))
            for least in (LEAST, 64, 96, 128, 160):
                if gives_all(1, least, False):
                    return Sizing(least=least, resamples=True)
            size = _own_size(model)
            if gives(*size, False):
                return Sizing(size=size)
    finally:
        for module in training:
            module.training = True
    raise InputError(f"{type(model).__name__} gives no feature maps, neither for images of {size[0]} x {size[1]} px.")


def _up(side: int, divisor: int) -> int:
    return -(-side // divisor) * divisor


def _own_size(model: nn.Module) -> tuple[int, int]:
    """The image size the model is built for."""
    embed = getattr(model, "patch_embed", None)
    traits = getattr(model, "_traits", None) or {}
    cfg = getattr(model, "pretrained_cfg", None) or {}
    found = traits.get("img_size") or getattr(embed, "img_size", None) or getattr(model, "img_size", None)
    found = found or cfg.get("input_size", (3, 224, 224))[1:]
    height, width = (found, found) if isinstance(found, int) else found
    return int(height), int(width)


class _PaddedPartition:
    """MaxViT's attention on maps of any size."""

    partition_size: Any
    axes = (2, 3)

    def _partition_attn(self, x: Tensor) -> Tensor:
        height, width = (x.shape[axis] for axis in self.axes)
        below, right = -height % self.partition_size[0], -width % self.partition_size[1]
        if not below and not right:
            return super()._partition_attn(x)  # type: ignore[misc]
        last = (0, 0) if self.axes == (1, 2) else ()
        x = super()._partition_attn(F.pad(x, (*last, 0, right, 0, below)))  # type: ignore[misc]
        return x.narrow(self.axes[0], 0, height).narrow(self.axes[1], 0, width)


class PaddedPartition2d(_PaddedPartition, PartitionAttention2d):
    """MaxViT's attention on maps (B, C, H, W) of any size."""


class PaddedPartitionCl(_PaddedPartition, PartitionAttentionCl):
    """MaxViT's attention on maps (B, H, W, C) of any size."""

    axes = (1, 2)


class PaddedParallelPartition(_PaddedPartition, ParallelPartitionAttention):
    """MaxViT's two attentions side by side on maps (B, H, W, C) of any size."""

    axes = (1, 2)


class PaddedHalo(HaloAttn):
    """Halo attention on maps (B, C, H, W) of any size; what is padded has no features, as what is beyond any border."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        below, right = -height % self.block_size, -width % self.block_size
        if not below and not right:
            return super().forward(x)
        stride = self.block_stride * (1 if isinstance(self.pool, nn.Identity) else 2)
        y = super().forward(F.pad(x, (0, right, 0, below)))
        return y[..., : cells(height, stride), : cells(width, stride)]


class PaddedGlobalContextStage(GlobalContextVitStage):
    """A stage of GC ViT; ``halves_query`` is whether a map larger than a window is pooled on the way to the query."""

    halves_query: bool = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        query = self.global_block(x)
        block: Any = self.blocks[0]
        if self.halves_query and tuple(query.shape[-2:]) != tuple(block.window_size):
            query = F.max_pool2d(query, 3, 2, 1)
        x = x.permute(0, 2, 3, 1)
        query = self.global_norm(query.permute(0, 2, 3, 1))
        for block in self.blocks:
            x = checkpoint(block, x, query) if self.grad_checkpointing else block(x, query)
        return self.norm(x).permute(0, 3, 1, 2).contiguous()


class PaddedGlobalContextBlock(GlobalContextVitBlock):
    """A block of GC ViT on maps (B, H, W, C) of any size."""

    def _window_attn(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        height, width = x.shape[1:3]
        size: Any = self.window_size
        window = (int(size[0]), int(size[1]))
        if q_global is not None and self.attn.use_global and tuple(q_global.shape[1:3]) != window:
            query = F.interpolate(q_global.permute(0, 3, 1, 2), window, mode="bicubic", align_corners=False)
            q_global = query.permute(0, 2, 3, 1)
        below, right = -height % window[0], -width % window[1]
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        return super()._window_attn(x, q_global)[:, :height, :width]


class AnySizeCrossVit(CrossVit):
    """CrossViT's token maps for images of any size.

    Each branch has as many tokens per pixel as it was built with; images that its tokens do not fill are padded.
    """

    def _grid(self, branch: int, size: Sequence[int]) -> list[int]:
        return [
            -(-n * built // own) for n, built, own in zip(size, _built_grid(self, branch), self.img_size, strict=True)
        ]

    def _embed(self, x: Tensor) -> list[Tensor]:
        size = x.shape[-2:]
        if tuple(size) == tuple(self.img_size):
            return super()._embed(x)
        tokens = []
        for branch, embed in enumerate(self.patch_embed):
            patches: Any = embed
            grid, built = self._grid(branch, size), _built_grid(self, branch)
            below, right = (
                math.ceil(n * own / old) - side
                for n, own, old, side in zip(grid, self.img_size, built, size, strict=True)
            )
            target = (grid[0] * patches.patch_size[0], grid[1] * patches.patch_size[1])
            image = scale_image(F.pad(x, (0, right, 0, below)), target)
            y = patches.proj(image).flatten(2).transpose(1, 2)
            y = torch.cat((getattr(self, f"cls_token_{branch}").expand(y.shape[0], -1, -1), y), dim=1)
            y = y + resample_abs_pos_embed(getattr(self, f"pos_embed_{branch}"), grid, list(built))
            tokens.append(self.pos_drop(y))
        return tokens

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As timm's, on the grid of the image that is given."""
        found: Any = super().forward_intermediates(x, indices, norm, stop_early, "NLC", intermediates_only)
        if output_fmt != "NCHW":
            return found
        maps = found if intermediates_only else found[1]
        blocks = self.num_feature_blocks
        branches = [i // blocks for i in sorted(feature_take_indices(self.num_branches * blocks, indices)[0])]
        maps = [
            y.transpose(1, 2).unflatten(2, tuple(self._grid(branch, x.shape[-2:]))).contiguous()
            for y, branch in zip(maps, branches, strict=True)
        ]
        return maps if intermediates_only else (found[0], maps)


def _built_grid(model: CrossVit, branch: int) -> tuple[int, int]:
    """Rows and columns of a branch's tokens at the image size the network is built for."""
    embed: Any = model.patch_embed[branch]
    return embed.img_size[0] // embed.patch_size[0], embed.img_size[1] // embed.patch_size[1]


_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    PartitionAttention2d: PaddedPartition2d,
    PartitionAttentionCl: PaddedPartitionCl,
    ParallelPartitionAttention: PaddedParallelPartition,
    HaloAttn: PaddedHalo,
    GlobalContextVitStage: PaddedGlobalContextStage,
    GlobalContextVitBlock: PaddedGlobalContextBlock,
    CrossVit: AnySizeCrossVit,
}
