"""Dynamic mask attention, bidirectional and causal, with the keys it keeps."""

from __future__ import annotations

from torch import Tensor

import attention
from attention.dynamic_mask import DynamicMaskAttention
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


@adapter("attn_dma", "attn_dma_causal")
def dynamic_mask(case: Case) -> dict[str, Tensor]:
    module = attention.create(
        "dynamic_mask",
        dim=case.config["dim"],
        num_heads=case.config["num_heads"],
        num_kv_heads=case.config["num_kv_heads"],
        window=case.config["window"],
        causal=case.config["is_causal"],
    )
    assert isinstance(module, DynamicMaskAttention)
    found = run_module(case, module)
    return {**found, "output.keep": module.kept(case.inputs["x"])}
