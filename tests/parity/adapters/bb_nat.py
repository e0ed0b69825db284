"""NAT, DiNAT, DiNAT_s and their isotropic forms against their released code, through the filter of checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import backbones
from backbones.nat_names import checkpoint_filter_fn
from tests.parity.harness import Case, adapter
from tests.parity.recipe import as_kept, recipe_inputs, recipe_state


@adapter("bb_nat_micro", "bb_dinat_micro", "bb_dinat_micro_padded", "bb_dinats_micro")
@torch.no_grad()
def pyramid(case: Case) -> dict[str, Tensor]:
    merging = any(key.startswith("layers.") for key in case.state)
    model = _loaded(case, case.state, "nat_mini", merging=merging, **case.config)
    return _classified(model, case.inputs["x"])


@adapter("bb_nat_mini_128x160")
@torch.no_grad()
def published(case: Case) -> dict[str, Tensor]:
    model = _loaded(case, recipe_state(case.name), "nat_mini")
    return as_kept(_classified(model, recipe_inputs(case.name)["x"]), case.expected)


@adapter("bb_dinat_dense_micro")
@torch.no_grad()
def dense(case: Case) -> dict[str, Tensor]:
    model = _loaded(case, case.state, "nat_mini", features_only=True, level_norms=True, **case.config)
    return {f"output.out{i}": y for i, y in enumerate(model(case.inputs["x"]))}


@adapter("bb_nat_isotropic_rpbvit")
@torch.no_grad()
def isotropic(case: Case) -> dict[str, Tensor]:
    config = {key: value for key, value in case.config.items() if key not in ("layer", "dilation")}
    model = _loaded(case, case.state, "vitrpb_small", **config)
    final, maps = model.forward_intermediates(case.inputs["x"])
    return {"output.tokens": maps[-1].permute(0, 2, 3, 1), "output.logits": model.forward_head(final)}


def _loaded(case: Case, state: dict[str, Tensor], name: str, **params: Any) -> nn.Module:
    model = backbones.create(name, **params)
    network = model.model if params.get("features_only") else model
    network.load_state_dict(checkpoint_filter_fn(state, network))
    return model.train(case.mode == "train")


def _classified(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    final, maps = model.forward_intermediates(image)
    found = {f"output.stage{i + 1}": y for i, y in enumerate(maps)}
    found["output.pooled"] = model.forward_head(final, pre_logits=True)
    return found | {"output.logits": model(image)}
