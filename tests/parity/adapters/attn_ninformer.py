"""NiNformer's block with its one LayerNorm."""

from __future__ import annotations

from torch import Tensor

from attention.ninformer import NiNBlock
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


@adapter("attn_ninformer")
def ninformer(case: Case) -> dict[str, Tensor]:
    config = case.config
    block = NiNBlock(config["d_model"], (config["seq_len"],), config["d_ffn"], config["dropout"])
    names = NiNBlock.checkpoint_filter({name: name for name in case.state})  # ours to theirs
    return run_module(case, block, names=names)
