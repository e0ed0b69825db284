"""MALA's attention in both forms and its block, which take channels first in the released code."""

from __future__ import annotations

from torch import Tensor, nn

import attention
from attention.layout import to_channels_first, to_channels_last
from attention.mala import MagnitudeAwareBlock, rotary_tables
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


@adapter("attn_mala")
def linear(case: Case) -> dict[str, Tensor]:
    return _run(case, attention.create("mala", **case.config), case.config["dim"])


@adapter("attn_mala_softmax")
def softmax(case: Case) -> dict[str, Tensor]:
    return _run(case, attention.create("mala", form="softmax", **case.config), case.config["dim"])


@adapter("attn_mala_block")
def block(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = MagnitudeAwareBlock(
        config["embed_dim"], config["num_heads"], hidden_dim=config["ffn_dim"], layer_scale=1.0
    )
    names = {f"norm{n}.{part}": f"norm{n}.norm.{part}" for n in (1, 2) for part in ("weight", "bias")}
    names |= {f"attn.qkv_gate.{part}": f"attn.qkvo.{part}" for part in ("weight", "bias")}
    names |= {f"pos.proj.{part}": f"pos.{part}" for part in ("weight", "bias")}
    return _run(case, module, config["embed_dim"], names)


def _run(case: Case, module: nn.Module, dim: int, names: dict[str, str] | None = None) -> dict[str, Tensor]:
    official = {f"qkv_gate.{part}": f"qkvo.{part}" for part in ("weight", "bias")}
    found = run_module(case, module, names=names or official, before=to_channels_last, after=to_channels_first)
    tables = rotary_tables(case.inputs["x"].shape[2:], dim // case.config["num_heads"])
    for name, table in zip(("cos", "sin"), tables, strict=True):
        found[f"output.{name}"] = table.repeat_interleave(2, -1)
    return found
