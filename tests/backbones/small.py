"""Small networks for the tests of this folder: how each family is made tiny, and for which image."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

import attention

HOST: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (32, 64, 64, 64), "num_classes": 5}
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
SWIN: dict[str, Any] = {
    "img_size": 64,
    "window_size": 4,
    "depths": (2, 1),
    "embed_dim": 32,
    "num_heads": (1, 2),
    "num_classes": 5,
}
MAXVIT: dict[str, Any] = {"img_size": 64, "embed_dim": (32, 32), "depths": (1, 1), "stem_width": 8, "num_classes": 5}

# Of one scale, then pyramids; each with its number of stages and of places where tokens are mixed.
TRANSFORMERS: dict[str, tuple[dict[str, Any], int, int]] = {
    "vit_tiny_patch16_224": (VIT, 1, 2),
    "deit_tiny_distilled_patch16_224": (VIT, 1, 2),
    "vit_srelpos_small_patch16_224": (VIT, 1, 2),
    "beitv2_base_patch16_224": (VIT | {"use_shared_rel_pos_bias": True, "init_values": None}, 1, 2),
    "eva02_tiny_patch14_224": (VIT, 1, 2),
    "vit_small_patch16_rope_mixed_224": (VIT, 1, 2),
    "samvit_base_patch16_224": (VIT | {"global_attn_indexes": (1,), "window_size": 2}, 1, 2),
    "swin_tiny_patch4_window7_224": (SWIN, 2, 3),
    "swinv2_tiny_window8_256": (SWIN, 2, 3),
    "swinv2_cr_tiny_224": (SWIN, 2, 3),
    "maxvit_pico_rw_256": (MAXVIT, 2, 4),
    "pvt_v2_b0": ({"depths": (1, 1, 1, 1), "num_classes": 5}, 4, 4),
    "twins_svt_small": ({"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (1, 2), "mlp_ratios": (2, 2)}, 2, 2),
    "davit_tiny": ({"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (1, 2), "num_classes": 5}, 2, 2),
}

_VIT_ENCODER: dict[str, Any] = {"img_size": 56, "depth": 2, "embed_dim": 32, "num_heads": 2}
_NAT: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 2, 2, 4), "kernel_size": 3}
_NAT_ISO: dict[str, Any] = {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8, "img_size": 64}
# Our own networks by the beginning of their names, the longest that fits first, as small as their parameters let them.
OURS: dict[str, dict[str, Any]] = {
    "agent_deit": {"depth": 4, "embed_dim": 16, "num_heads": 4, "img_size": 64},
    "agent_swin": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4), "img_size": 64},
    "dependencyvit": {"depth": 4, "embed_dim": 16, "num_heads": 4, "img_size": 64},
    "duoformer": {"trunk": "resnet10t", "embed_dim": 12, "depth": 2, "num_heads": 2, "img_size": 64},
    "inline_deit": {"depth": 4, "embed_dim": 16, "num_heads": 4, "img_size": 64},
    "inline_swin": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4), "img_size": 64},
    "l2vit": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 3)},
    "mavit": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 3)},
    "ninformer": {"depth": 4, "embed_dim": 16, "hidden_dim": 24},
    "biformer": {
        "depths": (1, 1, 1, 1),
        "dims": (16, 32, 48, 64),
        "head_dim": 16,
        "regions": 2,
        "topk": (1, 2, 4, None),
    },
    "ctranspath": {"depths": (1, 1, 1, 1), "embed_dim": 48},
    "dinat": _NAT,
    "dinat_iso": _NAT_ISO | {"kernel_size": 3},
    "dynperceiver": {
        "num_latents": 16,
        "depths": (1, 1, 1, 1),
        "cnn": "resnet50",
        "cnn_width": 0.125,
        "cnn_depths": (1, 1, 1, 1),
    },
    "gcvit_any": {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "img_size": 64},
    "gigapath": _VIT_ENCODER | {"img_size": 64},
    "h_optimus": _VIT_ENCODER,
    "lunit_dino_vits8": _VIT_ENCODER,
    "metaformer": {"depths": (1, 1, 1, 1), "dims": (32, 64, 64, 64)},
    "metaspikformer": {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1, 2), "num_heads": 2},
    "nat": _NAT,
    "nat_iso": _NAT_ISO | {"kernel_size": 3},
    "overlock": {
        "depths": (1, 1, 1, 1),
        "focus_depths": (1, 1),
        "dims": (8, 16, 24, 32),
        "kernel_sizes": (9, 7, 7, 5),
        "num_heads": (1, 2),
        "mlp_ratios": (2, 2, 2, 2),
        "focus_mlp_ratios": (2, 2),
    },
    "phikon_v2": _VIT_ENCODER | {"img_size": 64},
    "qtseg_encoder": {"width": 4},
    "uni": _VIT_ENCODER | {"img_size": 64},
    "uni2_h": _VIT_ENCODER,
    "virchow2": _VIT_ENCODER,
    "vitrpb": _NAT_ISO,
}
# A few of timm's, of every way in which images of any size are taken.
OF_TIMM: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 4)},
    "swinv2_tiny_window8_256": {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 4)},
    "maxvit_pico_rw_256": {"embed_dim": (32, 32, 32, 64), "depths": (1, 1, 1, 1), "stem_width": 8, "img_size": 64},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 2, 4)},
    "gcvit_xxtiny": {"embed_dim": 16, "img_size": 64},
    "crossvit_tiny_240": {},
    "volo_d1_224": {"img_size": 96},
    "halonet26t": {},
    "vit_tiny_patch16_224": {"depth": 3, "embed_dim": 32, "num_heads": 2},
    "eva02_tiny_patch14_224": {"depth": 3, "embed_dim": 32, "num_heads": 2},
    "beit_base_patch16_224": {"depth": 3, "embed_dim": 32, "num_heads": 2},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "efficientnet_b0": {},
    "regnety_002": {},
}


def small_params(name: str) -> dict[str, Any]:
    """What makes the network ``name`` small."""
    if name in OF_TIMM:
        return OF_TIMM[name]
    fitting = [start for start in OURS if name.startswith(start)]
    return OURS[max(fitting, key=len)] if fitting else {}


def make(name: str, **params: Any) -> nn.Module:
    """A tiny network, in evaluation mode, whose every branch counts."""
    import backbones.registry  # noqa: F401  (registers our models)

    given = HOST if name.startswith("metaformer") else TRANSFORMERS.get(name, ({}, 0, 0))[0]
    return wake(timm.create_model(name, **given | params))


@torch.no_grad()
def wake(model: nn.Module) -> nn.Module:
    """Set to one the norms and layer scales that start at (nearly) nothing."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.endswith("bias") and parameter.abs().max() < 0.5:
            parameter.fill_(1.0)
    return model.eval()


def of_maps(kind: Literal["mixer", "gate"]) -> list[str]:
    """Names of the registered modules that take maps of two axes."""
    return [name for name in attention.available(kind) if 2 in getattr(attention.class_of(name, kind), "grids", (2,))]


def image(model: nn.Module, batch: int = 2, seed: int = 0) -> Tensor:
    """Images of the size the network was built for, 64 where it takes any."""
    embed = getattr(model, "patch_embed", None)
    height, width = getattr(embed, "img_size", None) or (64, 64)
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
