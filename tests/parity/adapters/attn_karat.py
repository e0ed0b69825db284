"""Kolmogorov-Arnold attention against a reference written from the paper's algorithm."""

from __future__ import annotations

from torch import Tensor

import attention
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


@adapter("attn_karat")
def karat(case: Case) -> dict[str, Tensor]:
    module = attention.create(
        "karat",
        dim=case.config["dim"],
        num_heads=case.config["num_heads"],
        input_size=(case.config["num_tokens"],),
        rank=case.config["r"],
        harmonics=case.config["grid"],
    )
    return run_module(case, module, names={f"operators.{letter}": letter for letter in "abW"})
