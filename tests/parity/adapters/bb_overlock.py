"""OverLoCK against its released code: classifier, training answers, detection form, the smallest variant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import backbones
from backbones.overlock import OverLoCK, checkpoint_filter_fn
from tests.parity.harness import Case, adapter
from tests.parity.recipe import as_kept, recipe_inputs, recipe_state

_NAMES = {
    "depth": "depths",
    "sub_depth": "focus_depths",
    "embed_dim": "dims",
    "kernel_size": "kernel_sizes",
    "mlp_ratio": "mlp_ratios",
    "sub_num_heads": "num_heads",
    "sub_mlp_ratio": "focus_mlp_ratios",
    "smk_size": "smk_size",
    "ls_init_value": "layer_scale",
    "num_classes": "num_classes",
    "projection": "head_width",
}


def _build(case: Case, state: dict[str, Tensor], **params: Any) -> nn.Module:
    params |= {_NAMES[key]: value for key, value in case.config.items() if key != "use_gemm"}
    model = backbones.create("overlock_xtiny", **params)
    target = model.model if params.get("features_only") else model
    missing, unexpected = target.load_state_dict(checkpoint_filter_fn(state, target), strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    return model.train(case.mode == "train")


def _maps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    assert isinstance(model, OverLoCK) and model.aux_head is not None
    seen: dict[str, Tensor] = {}
    for name, stage in (("stage3_base", model.base[2]), ("overview", model.overview)):
        assert stage is not None
        stage.register_forward_hook(lambda _, __, y, name=name: seen.update({name: y}))
    final, maps = model.forward_intermediates(x)
    return seen | {
        "stage1": maps[0],
        "stage2": maps[1],
        "focus": final,
        "logits": model(x),
        "aux_logits": model.aux_head(seen["overview"]),
    }


@adapter("bb_overlock_micro")
@torch.no_grad()
def micro(case: Case) -> dict[str, Tensor]:
    found = _maps(_build(case, case.state, aux_head=True), case.inputs["x"])
    return {f"output.{name}": value for name, value in found.items()}


@adapter("bb_overlock_micro_train")
@torch.no_grad()
def training(case: Case) -> dict[str, Tensor]:
    logits, overview = _build(case, case.state, aux_head=True)(case.inputs["x"])
    return {"output.main": logits, "output.aux": overview}


@adapter("bb_overlock_dense_det_micro")
@torch.no_grad()
def detection(case: Case) -> dict[str, Tensor]:
    model = _build(case, case.state, features_only=True, dense="detection")
    return {f"output.out{level}": y for level, y in enumerate(model(case.inputs["x"]))}


@adapter("bb_overlock_xt_224")
@torch.no_grad()
def xtiny(case: Case) -> dict[str, Tensor]:
    found = _maps(_build(case, recipe_state(case.name), aux_head=True), recipe_inputs(case.name)["x"])
    return as_kept({f"output.{name}": value for name, value in found.items()}, case.expected)
