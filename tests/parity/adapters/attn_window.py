"""DaViT's window attention, of windows that are already cut out: each is a map of its own."""

from __future__ import annotations

from torch import Tensor

import attention
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


@adapter("attn_davit_window")
def window(case: Case) -> dict[str, Tensor]:
    sides = tuple(case.config["window_size"])
    module = attention.create(
        "window",
        dim=case.config["dim"],
        num_heads=case.config["num_heads"],
        window_size=sides,
        relative_bias=False,
        padding="released",
    )
    return run_module(case, module, before=lambda x: x.unflatten(1, sides), after=lambda y: y.flatten(1, 2))
