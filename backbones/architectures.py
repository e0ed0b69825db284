"""The networks of pathology encoders that timm has not, registered with timm's decorator.

``uni``, ``phikon_v2`` and the like are timm networks with other arguments; CTransPath, CONCH v1.5 and CLAM's truncated
ResNet-50 need a module of their own. Every name of :mod:`backbones.pathology` becomes a timm model here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.pathology import ENCODERS, PathologyEncoder

State = dict[str, Tensor]
_LAYERS: dict[str, Callable[..., nn.Module]] = {"swiglu_packed": SwiGLUPacked, "silu": nn.SiLU}


class ConvStem(nn.Module):
    """CTransPath's patch embedding: two strided 3 x 3 convolutions and one 1 x 1 instead of a linear projection.

    Images (B, 3, H, W) become (B, H / 4, W / 4, C). Takes the arguments of timm's ``PatchEmbed``.

    Source: Wang et al., Medical Image Analysis 2022, doi:10.1016/j.media.2022.102559.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Callable[[int], nn.Module] | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        width = embed_dim // 8
        for _stage in range(2):
            layers += [nn.Conv2d(in_chans, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU()]
            in_chans, width = width, 2 * width
        layers.append(nn.Conv2d(in_chans, embed_dim, 1))
        self.proj = nn.Sequential(*layers)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


def fovea_ctranspath(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Swin-T whose patch embedding is :class:`ConvStem`."""
    build = timm.model_entrypoint("swin_tiny_patch4_window7_224")
    return build(pretrained=False, embed_layer=ConvStem, **kwargs)


class TruncatedResNet(ResNet):
    """ResNet-50 without its last stage: 1024 features at stride 16, averaged over the image."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(Bottleneck, layers=(3, 4, 6), channels=(64, 128, 256), **kwargs)  # type: ignore[arg-type]
        self.layer4 = nn.Identity()  # timm's forward names all four stages


def fovea_resnet50_clam(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """:class:`TruncatedResNet`; the feature maps of ``features_only`` are its stem and three stages."""
    return build_model_with_cfg(
        TruncatedResNet, "resnet50", pretrained=False, feature_cfg={"out_indices": (0, 1, 2, 3)}, **kwargs
    )


class AttentionalPooler(nn.Module):
    """Learned queries that read tokens (B, N, context_dim) out into (B, queries, dim) by multi-head attention.

    Queries and tokens are layer-normalised before the projections, none of which has a bias. The parameters are named
    as in the released weights of CONCH.

    Source: Yu et al. (CoCa), 2022, arXiv:2205.01917; as used by Lu et al. (CONCH), Nature Medicine 2024.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int = 8, queries: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(queries, dim))
        self.ln_k = nn.LayerNorm(context_dim)
        self.ln_q = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        batch = tokens.shape[0]
        query = self.to_q(self.ln_q(self.query)).expand(batch, -1, -1)
        key, value = self.to_kv(self.ln_k(tokens)).chunk(2, dim=-1)
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        read = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(read.transpose(1, 2).flatten(2))


class ConchV15(nn.Module):
    """The image tower of CONCH v1.5: a ViT-L/16 whose tokens one learned query reads out into 768 features.

    Sizes and parameter names follow the public loading code of TITAN: 24 blocks of width 1024 with layer scale, an
    attentional pooler with 8 heads and one query over all tokens, class token included, then a layer norm. The released
    files are behind an access request, so this class has been checked for shapes and names, not against their output.

    Source: Ding et al. (TITAN), Nature Medicine 2025, arXiv:2411.19666.
    """

    def __init__(
        self,
        img_size: int = 448,
        patch_size: int = 16,
        context_dim: int = 1024,
        embed_dim: int = 768,
        depth: int = 24,
        num_heads: int = 16,
        init_values: float = 1e-6,
        num_classes: int = 0,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.trunk = VisionTransformer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=context_dim,
            depth=depth,
            num_heads=num_heads,
            init_values=init_values,
            num_classes=0,
        )
        self.attn_pool_contrast = AttentionalPooler(embed_dim, context_dim)
        self.ln_contrast = nn.LayerNorm(embed_dim)
        self.num_features = self.head_hidden_size = embed_dim
        self.num_classes = num_classes
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, image: Tensor) -> Tensor:
        """Tokens (B, 1 + patches, context_dim) of the trunk, class token first."""
        return self.trunk.forward_features(image)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0])
        return pooled if pre_logits else self.head(pooled)

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(image))


def fovea_conch_v1_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """:class:`ConchV15`; it has no feature maps."""
    kwargs.setdefault("num_classes", 0)
    return build_model_with_cfg(ConchV15, "conch_v1_5", pretrained=False, **kwargs)


_OWN: dict[str, Callable[..., nn.Module]] = {
    "fovea_ctranspath": fovea_ctranspath,
    "fovea_resnet50_clam": fovea_resnet50_clam,
    "fovea_conch_v1_5": fovea_conch_v1_5,
}


def checkpoint_filter(encoder: PathologyEncoder, state: Mapping[str, Tensor], model: nn.Module) -> State:
    """Rename the released weights of ``encoder`` to the parameters of ``model``; our own state dicts pass unchanged."""
    return _FILTERS.get(encoder.name, _filter_nothing)(dict(state), model)


def _filter_nothing(state: State, _model: nn.Module) -> State:
    return state


def _filter_phikon_v2(state: State, _model: nn.Module) -> State:
    """From the Dinov2 layout of the transformers library to timm's vision transformer."""
    if "embeddings.cls_token" not in state:
        return state
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
    }
    in_block = {
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
    }
    renamed: State = {}
    for key, value in state.items():
        block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", key)
        if key == "embeddings.mask_token":  # used in training only
            continue
        if block is None:
            renamed[names.get(key, key)] = value
            continue
        prefix, rest = f"blocks.{block[1]}.", block[2]
        part = re.fullmatch(r"attention\.attention\.(query|key|value)\.(weight|bias)", rest)
        if part is None:
            for old, new in in_block.items():
                rest = rest.replace(old, new)
            renamed[prefix + rest] = value
        elif part[1] == "query":  # timm holds the three projections in one matrix
            stem = key.removesuffix(f"query.{part[2]}")
            parts = [state[f"{stem}{name}.{part[2]}"] for name in ("query", "key", "value")]
            renamed[f"{prefix}attn.qkv.{part[2]}"] = torch.cat(parts)
    return renamed


def _filter_ctranspath(state: State, _model: nn.Module) -> State:
    """Drop buffers that are computed, and move each downsampling to the stage it leads to, as timm has it."""
    state = {k: v for k, v in state.items() if not k.endswith(("relative_position_index", "attn_mask"))}
    if "layers.0.downsample.reduction.weight" not in state:
        return state
    return {re.sub(r"^layers\.(\d+)\.downsample", _next_stage, key): value for key, value in state.items()}


def _next_stage(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) + 1}.downsample"


def _filter_resnet50_clam(state: State, _model: nn.Module) -> State:
    """A whole ResNet-50 has a fourth stage and a classifier that are not used here."""
    return {key: value for key, value in state.items() if not key.startswith(("layer4.", "fc."))}


def _filter_conch_v1_5(state: State, model: nn.Module) -> State:
    """Resample position embeddings of another grid, in the way the released code does."""
    key = "trunk.pos_embed"
    if key not in state or not isinstance(model, ConchV15):
        return state
    grid = model.trunk.patch_embed.grid_size[0]
    return state | {key: _resample_positions(state[key], grid)}


def _resample_positions(positions: Tensor, grid: int) -> Tensor:
    """(1, 1 + n * n, C) to (1, 1 + grid * grid, C), bicubic.

    The scale carries the offset of a tenth of a cell that DINO's code adds and its descendants were trained with.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == grid:
        return positions
    cells = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    cells = F.interpolate(cells.float(), scale_factor=(scale, scale), mode="bicubic").to(positions.dtype)
    return torch.cat((positions[:, :1], cells.flatten(2).transpose(1, 2)), dim=1)


_FILTERS: dict[str, Callable[[State, nn.Module], State]] = {
    "phikon_v2": _filter_phikon_v2,
    "ctranspath": _filter_ctranspath,
    "resnet50_clam": _filter_resnet50_clam,
    "conch_v1_5": _filter_conch_v1_5,
}


def _entry_point(encoder: PathologyEncoder) -> Callable[..., nn.Module]:
    """A timm entry point for one encoder: its architecture with its arguments, any of which a caller may override."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        arguments = {k: _LAYERS[v] if k.endswith("_layer") else v for k, v in encoder.arguments.items()}
        arguments |= {"pretrained_cfg": _default_cfg(encoder)} | {k: v for k, v in kwargs.items() if v is not None}
        own = _OWN.get(encoder.architecture)
        model = (own or timm.model_entrypoint(encoder.architecture))(pretrained=False, **arguments)
        if pretrained:
            from backbones.checkpoints import load_from_hub

            load_from_hub(model, encoder)
        return model

    build.__name__ = build.__qualname__ = encoder.name
    build.__doc__ = f"{encoder.title}. {encoder.paper}. Licence: {encoder.licence}."
    return build


def _default_cfg(encoder: PathologyEncoder) -> dict[str, Any]:
    return {
        "architecture": encoder.name,
        "input_size": (3, encoder.input_size, encoder.input_size),
        "num_classes": 0,
        "mean": encoder.mean,
        "std": encoder.std,
        "interpolation": "bicubic",
        "crop_pct": encoder.input_size / (encoder.resize or encoder.input_size),
        "license": encoder.licence,
        "origin_url": f"https://huggingface.co/{encoder.hub_id}",
    }


for _encoder in ENCODERS.values():
    _build = _entry_point(_encoder)
    _build.__module__ = __name__
    setattr(sys.modules[__name__], _encoder.name, register_model(_build))
