"""Where the transformers of timm mix tokens, and how another mixer is put there: one entry per class of block.

A row of ``_PLACES`` says under which attribute a block holds its mixer and which function installs another in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from timm.models import (
    beit,
    davit,
    eva,
    focalnet,
    gcvit,
    inception_next,
    maxxvit,
    metaformer,
    pvt_v2,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    twins,
    vision_transformer,
    vision_transformer_relpos,
    vision_transformer_sam,
    volo,
)
from torch import nn

import attention as registry
from backbones import wrappers
from backbones.wrappers import ChannelsFirst, Grid, Patches, Sized
from kernels.errors import InputError

FAMILIES = (
    "ViT (DeiT, BEiT, EVA, SAM's and those with relative positions), Swin, Swin V2, MaxViT, PVT v2, Twins, DaViT, "
    "GC ViT, VOLO, MetaFormer (PoolFormer, ConvFormer, CAFormer), FocalNet, InceptionNeXt and metaformer_*"
)
_ISOTROPIC = (
    vision_transformer.VisionTransformer,
    beit.Beit,
    eva.Eva,
    vision_transformer_relpos.VisionTransformerRelPos,
    vision_transformer_sam.VisionTransformerSAM,
)


@dataclass(frozen=True)
class Place:
    """One place where tokens are mixed.

    Attributes:
        block: holds the mixer under ``attribute``.
        dim: channels there.
        num_heads: of the mixer that is there now.
        install: puts another mixer of maps (B, H, W, C) there.
    """

    block: nn.Module
    attribute: str
    dim: int
    num_heads: int
    install: Callable[[nn.Module], None]


@dataclass(frozen=True)
class Stage:
    """The places of a stage in order, and the stride of its map."""

    places: list[Place]
    stride: int


def stages_of(model: nn.Module) -> list[Stage]:
    """The stages of ``model`` that mix tokens, finest first; one for a model of one scale, none where nothing fits."""
    places = list(_places(model))
    infos = _infos(model)
    if not places or not infos:
        return []
    if isinstance(model, _ISOTROPIC):
        return [Stage(places, infos[-1]["reduction"])]
    stages = []
    for info in infos:
        # Twins misnames its stages there.
        name = info["module"].replace("block.", "blocks.") if isinstance(model, twins.Twins) else info["module"]
        inside = set(model.get_submodule(name).modules())
        found = [place for place in places if place.block in inside]
        if found:
            stages.append(Stage(found, info["reduction"]))
    return stages


def forget_positions(model: nn.Module) -> None:
    """Remove what only the replaced attention used: shared position tables and GC ViT's makers of global queries."""
    if any(not _replaced(place) for place in _places(model)):
        return
    if isinstance(model, beit.Beit):
        model.rel_pos_bias = None  # type: ignore[assignment]
    elif isinstance(model, vision_transformer_relpos.VisionTransformerRelPos):
        model.shared_rel_pos = None
    elif isinstance(model, eva.Eva) and model.rope is not None and any(True for _ in model.rope.parameters()):
        model.rope, model.rope_mixed = None, False  # type: ignore[assignment]
    elif isinstance(model, gcvit.GlobalContextVit):
        for stage in model.stages:
            stage.global_block = nn.Identity()
            stage.global_norm = nn.Identity()


def _replaced(place: Place) -> bool:
    return any(hasattr(module, "kind") for module in getattr(place.block, place.attribute).modules())


def _infos(model: nn.Module) -> list[dict[str, Any]]:
    infos = getattr(model, "feature_info", None) or []
    return list(infos) if isinstance(infos, list) else infos.get_dicts()


def _places(model: nn.Module) -> Iterator[Place]:
    grid = _patch_grid(model)
    stage: nn.Module | None = None
    for block in model.modules():
        if isinstance(block, metaformer.MetaFormerStage):
            stage = block  # comes before the blocks inside it
        attribute, install = next((row for kind, row in _PLACES.items() if isinstance(block, kind)), ("", None))
        if install is None or (install is _in_vit and grid is None):
            continue
        current = getattr(block, attribute)
        norm = block.norm if isinstance(block, inception_next.MetaNeXtBlock) else block.norm1
        dim = _width(norm)
        heads = _heads(current, dim)

        def put(
            mixer: nn.Module,
            block: nn.Module = block,
            dim: int = dim,
            heads: int = heads,
            install: Callable[..., None] = install,
            stage: nn.Module | None = stage,
        ) -> None:
            if install is _in_vit:
                assert grid is not None
                grid.watch(model.patch_embed)  # type: ignore[arg-type]
                prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
                reader = registry.create("cross", kind="cross", dim=dim, num_heads=heads) if prefix else None
                install(block, mixer, grid, prefix, reader)
            elif install is _in_metaformer:
                install(block, mixer, stage)
            else:
                install(block, mixer)

        yield Place(block, attribute, dim, heads, put)


def _patch_grid(model: nn.Module) -> Grid | None:
    """The patch grid of a vision transformer, the one its blocks share where some are replaced; else None."""
    if not isinstance(model, _ISOTROPIC) or isinstance(model, vision_transformer_sam.VisionTransformerSAM):
        return None
    for hook in model.patch_embed._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Grid):
            return owner
    height, width = model.patch_embed.grid_size or (1, 1)  # type: ignore[misc]
    return Grid((height, width))


def _width(norm: Any) -> int:
    """Channels of any layer of normalisation."""
    return int(norm.weight.shape[0])


def _heads(current: nn.Module, dim: int) -> int:
    """As many heads as there are now, or of 32 channels where there are none."""
    for module in current.modules():
        heads = getattr(module, "num_heads", None)
        if isinstance(heads, int) and heads and dim % heads == 0:
            return heads
    return next(heads for heads in range(max(dim // 32, 1), 0, -1) if dim % heads == 0)


def _in_vit(block: Any, mixer: nn.Module, grid: Grid, prefix: int, reader: nn.Module | None) -> None:
    block.attn = Patches(mixer, grid, prefix, reader)


def _in_sam(block: Any, mixer: nn.Module) -> None:
    block.attn, block.window_size = mixer, 0


def _in_swin(block: Any, mixer: nn.Module) -> None:
    for kind, mixing in (
        (swin_transformer.SwinTransformerBlock, wrappers.MixingSwinBlock),
        (swin_transformer_v2.SwinTransformerV2Block, wrappers.MixingSwinV2Block),
        (swin_transformer_v2_cr.SwinTransformerV2CrBlock, wrappers.MixingSwinV2CrBlock),
    ):
        if isinstance(block, kind):
            # The class alone changes: parameters, buffers and their names stay as they are.
            block.__class__ = mixing
    block.attn, block.attn_mask, block.shift_size = mixer, None, (0, 0)


def _in_partition(block: Any, mixer: nn.Module) -> None:
    block.__class__ = wrappers.MixingPartitionCl
    block.attn = mixer


def _in_partition_2d(block: Any, mixer: nn.Module) -> None:
    block.__class__ = wrappers.MixingPartition2d
    block.attn = ChannelsFirst(mixer)


def _in_gcvit(block: Any, mixer: nn.Module) -> None:
    block.__class__ = wrappers.MixingGlobalContextBlock
    block.attn = mixer


def _in_davit(block: Any, mixer: nn.Module) -> None:
    block.__class__ = wrappers.MixingSpatialBlock
    block.attn = mixer


def _in_sized(block: Any, mixer: nn.Module) -> None:
    block.attn = Sized(mixer)


def _in_map(block: Any, mixer: nn.Module) -> None:
    block.attn = mixer


def _in_metaformer(block: Any, mixer: nn.Module, stage: Any) -> None:
    block.token_mixer = ChannelsFirst(mixer) if stage.use_nchw else mixer
    if not stage.use_nchw:
        stage.__class__ = wrappers.MixingMetaFormerStage


def _in_token_mixer(block: Any, mixer: nn.Module) -> None:
    block.token_mixer = ChannelsFirst(mixer)


def _in_focalnet(block: Any, mixer: nn.Module) -> None:
    block.modulation = ChannelsFirst(mixer)


_PLACES: dict[type[nn.Module], tuple[str, Callable[..., None]]] = {
    vision_transformer.Block: ("attn", _in_vit),
    vision_transformer.ResPostBlock: ("attn", _in_vit),
    vision_transformer_relpos.RelPosBlock: ("attn", _in_vit),
    vision_transformer_relpos.ResPostRelPosBlock: ("attn", _in_vit),
    beit.Block: ("attn", _in_vit),
    eva.EvaBlock: ("attn", _in_vit),
    eva.EvaBlockPostNorm: ("attn", _in_vit),
    vision_transformer_sam.Block: ("attn", _in_sam),
    swin_transformer.SwinTransformerBlock: ("attn", _in_swin),
    swin_transformer_v2.SwinTransformerV2Block: ("attn", _in_swin),
    swin_transformer_v2_cr.SwinTransformerV2CrBlock: ("attn", _in_swin),
    maxxvit.PartitionAttentionCl: ("attn", _in_partition),
    maxxvit.PartitionAttention2d: ("attn", _in_partition_2d),
    pvt_v2.Block: ("attn", _in_sized),
    twins.Block: ("attn", _in_sized),
    davit.SpatialBlock: ("attn", _in_davit),
    gcvit.GlobalContextVitBlock: ("attn", _in_gcvit),
    volo.Outlooker: ("attn", _in_map),
    volo.Transformer: ("attn", _in_map),
    metaformer.MetaFormerBlock: ("token_mixer", _in_metaformer),
    inception_next.MetaNeXtBlock: ("token_mixer", _in_token_mixer),
    focalnet.FocalNetBlock: ("modulation", _in_focalnet),
}


def refuse(model: nn.Module) -> InputError:
    """The sentence for a model whose tokens are mixed in none of the known places."""
    return InputError(
        f"{type(model).__name__} has no token mixer that can be replaced; a mixer takes the place of the attention of "
        f"{FAMILIES}."
    )
