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
