"""Bi-level routing attention in both released forms, with what the legacy one returns of its routing."""

from __future__ import annotations

import torch
from torch import Tensor

from attention.bi_level_routing import BiLevelRoutingAttention
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter

_POOLINGS = {"identity": "identity", "avgpool": "average", "maxpool": "max"}


@adapter("bb_bra_legacy_*")
def legacy(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = BiLevelRoutingAttention(
        config["dim"],
        config["num_heads"],
        regions=config["n_win"],
        topk=config["topk"],
        qk_dim=config.get("qk_dim"),
        lepe_kernel=config["side_dwconv"],
        kv_pooling=_POOLINGS[config["kv_downsample_mode"]],
        kv_pooling_size=config.get("kv_downsample_ratio", 1),
        padding="released" if config.get("auto_pad") else "error",
        small_maps="error",
    )
    found = _run(case, module, {"qkv": "qkv.qkv", "proj": "wo"})
    with torch.no_grad():
        x, _ = module._extended(case.inputs["x"], None)
        q, k, _ = module._qkv(x, None)
        chosen, similarity = module.route(q, k, None, module.region_grid(*x.shape[1:3]))
    return found | {"output.routing_index": chosen, "output.routing_weight": similarity}


@adapter("bb_bra_nchw_*")
def refactored(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = BiLevelRoutingAttention(
        config["dim"],
        config["num_heads"],
        regions=config["n_win"],
        topk=config["topk"],
        form="refactored",
        lepe_kernel=config["side_dwconv"],
        padding="released",
    )
    layout = {"before": lambda x: x.movedim(1, -1), "after": lambda y: y.movedim(-1, 1)}
    return _run(case, module, {"qkv": "qkv_linear", "proj": "output_linear"}, **layout)


def _run(case: Case, module: BiLevelRoutingAttention, layers: dict[str, str], **layout) -> dict[str, Tensor]:
    names = {}
    for name, _ in module.named_parameters():
        layer, part = name.split(".")
        names[name] = f"param.{layers.get(layer, layer)}.{part}"
    case.inputs["grad_out"] = case.inputs["grad_weight"]
    return run_module(case, module, names=names, **layout)
