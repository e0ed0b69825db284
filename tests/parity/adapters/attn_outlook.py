"""Outlook attention with both strides, on even and odd maps."""

from __future__ import annotations

from torch import Tensor

import attention
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


@adapter("attn_outlook_s*")
def outlook(case: Case) -> dict[str, Tensor]:
    config = case.config
    options = {name: config[name] for name in ("dim", "num_heads", "kernel_size", "stride", "qkv_bias")}
    return run_module(case, attention.create("outlook", **options))
