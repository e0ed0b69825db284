"""Polarized self-attention, as released and as the paper's equations."""

from __future__ import annotations

from torch import Tensor, nn

import attention
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter

_RELEASED = {
    "channel_query": "conv_q_right",
    "channel_value": "conv_v_right",
    "channel_up": "conv_up",
    "spatial_query": "conv_q_left",
    "spatial_value": "conv_v_left",
}
_EQUATIONS = {
    "channel_query": "ch_wq",
    "channel_value": "ch_wv",
    "channel_up": "ch_wz",
    "norm": "ln",
    "spatial_query": "sp_wq",
    "spatial_value": "sp_wv",
}


@adapter("attn_psa_p", "attn_psa_s")
def released(case: Case) -> dict[str, Tensor]:
    name = {"attn_psa_p": "polarized_parallel", "attn_psa_s": "polarized_sequential"}[case.name]
    return _run(case, attention.create(name, dim=case.config["planes"], form="released"), _RELEASED)


@adapter("attn_psa_paper_*", skip={"grad.ch_wq.bias": "rounding: it shifts all logits of a softmax alike"})
def equations(case: Case) -> dict[str, Tensor]:
    name = case.name.replace("attn_psa_paper", "polarized")
    return _run(case, attention.create(name, dim=case.config["channel"], form="paper"), _EQUATIONS)


def _run(case: Case, module: nn.Module, layers: dict[str, str]) -> dict[str, Tensor]:
    names = {}
    for name, _ in module.named_parameters():
        layer, _, rest = name.partition(".")
        names[name] = f"{layers[layer]}.{rest}"
    return run_module(case, module, names=names)
