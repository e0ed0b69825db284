"""Sparsifiner behind a class token: output, and which keys are attended and why."""

from __future__ import annotations

from torch import Tensor

import attention
from attention.sparsifiner import SparsifinerAttention
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


@adapter("attn_sparsifiner")
def sparsifiner(case: Case) -> dict[str, Tensor]:
    config = case.config
    side = round((config["num_tokens"] - 1) ** 0.5)
    module = attention.create(
        "sparsifiner",
        dim=config["dim"],
        num_heads=config["num_heads"],
        input_size=(side, side),
        keep_rate=config["attn_keep_rate"],
        prefix=1,
        token_reduction=config["reduce_n_factor"],
        channel_reduction=config["reduce_c_factor"],
        coefficients=config["basis_coef_topk"],
        threshold=config["basis_threshold"],
        qkv_bias=config["qkv_bias"],
    )
    assert isinstance(module, SparsifinerAttention)
    found = run_module(case, module)
    predicted = module.connectivity(case.inputs["x"])
    return found | {
        "output.attn_mask": predicted.mask.float(),
        "output.basis_coef": predicted.coefficients,
        "output.approx_attn": predicted.estimate,
    }
