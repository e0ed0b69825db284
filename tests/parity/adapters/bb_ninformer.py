"""NiNformer against its released code."""

from __future__ import annotations

import torch
from torch import Tensor

import backbones
from backbones.ninformer import checkpoint_filter_fn
from tests.parity.harness import Case, adapter


@adapter("bb_ninformer_micro")
def ninformer(case: Case) -> dict[str, Tensor]:
    config = case.config
    model = backbones.create(
        "ninformer_patch4_32",
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        in_chans=config["in_channels"],
        num_classes=config["num_classes"],
        embed_dim=config["d_model"],
        hidden_dim=config["d_ffn"],
        depth=config["num_layers"],
    )
    model.load_state_dict(checkpoint_filter_fn(case.state, model))
    model.train(case.mode == "train")
    with torch.no_grad():
        features = model.forward_features(case.inputs["x"])
        return {"output.tokens": features.flatten(2).transpose(1, 2), "output.logits": model.forward_head(features)}
