"""Efficient local attention in the paper's four sizes."""

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
