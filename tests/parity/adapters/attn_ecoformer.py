"""EcoFormer attention with hash functions that are already learned."""

from __future__ import annotations

from torch import Tensor

import attention
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


@adapter("attn_ecoformer")
def ecoformer(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = attention.create(
        "ecoformer", dim=config["dim"], num_heads=config["num_heads"], bits=config["nbits"], anchors=config["m"]
    )
    return run_module(case, module)
