"""Meta-SpikeFormer against its released code."""

from __future__ import annotations

import torch
from torch import Tensor

import backbones
from backbones.meta_spikformer import checkpoint_filter_fn
from tests.parity.harness import Case, adapter


@adapter("bb_metaspikformer_*")
def meta_spikformer(case: Case) -> dict[str, Tensor]:
    config = case.config
    model = backbones.create(
        "metaspikformer_8_384",
        dims=config["embed_dim"],
        time_steps=config["T"],
        num_classes=config["num_classes"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratios"],
    )
    model.load_state_dict(checkpoint_filter_fn(case.state, model))
    model.train(case.mode == "train")
    with torch.no_grad():
        features = model.forward_features(case.inputs["x"])
        steps = features.unflatten(1, (config["T"], -1)).transpose(0, 1)
        return {"output.features": steps, "output.logits": model.forward_head(features)}
