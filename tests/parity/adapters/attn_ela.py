"""Efficient local attention in the paper's four sizes, and timm's module of that name."""

from __future__ import annotations

from torch import Tensor

import attention
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter

_VARIANTS = {"T": "tiny", "B": "base", "S": "small", "L": "large"}


@adapter("attn_ela_[tbsl]")
def ela(case: Case) -> dict[str, Tensor]:
    return run_module(
        case, attention.create("ela", dim=case.config["channels"], variant=_VARIANTS[case.config["variant"]])
    )


@adapter("attn_ela_timm")
def timm(case: Case) -> dict[str, Tensor]:
    names = {
        "conv.weight": "conv_h.weight",
        "gn.weight": "norm_h.weight",
        "gn.bias": "norm_h.bias",
        "gn_w.weight": "norm_w.weight",
        "gn_w.bias": "norm_w.bias",
    }
    return run_module(case, attention.create("ela", dim=case.config["channels"], variant="timm"), names=names)
