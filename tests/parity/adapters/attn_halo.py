"""Halo attention in both forms; the released one also with stride."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attention.halo import HaloAttention, HaloLayer
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter

_LAYOUT: dict[str, Any] = {"before": lambda x: x.movedim(1, -1), "after": lambda y: y.movedim(-1, 1)}


@adapter("attn_halo_masked")
def masked(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = HaloAttention(
        config["dim"], config["heads"], config["block_size"], config["halo_size"], head_dim=config["dim_head"]
    )
    names = {f"layer.{part}.weight": f"to_{part}.weight" for part in ("q", "kv")}
    names |= {f"layer.proj.{part}": f"to_out.{part}" for part in ("weight", "bias")}
    names |= {f"layer.{axis}_rel": f"rel_pos_emb.rel_{axis}" for axis in ("height", "width")}
    return run_module(case, module, names=names, **_LAYOUT)


@adapter("attn_halo_timm*")
def released(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = HaloLayer(
        config["dim"],
        config.get("dim_out", config["dim"]),
        config["num_heads"],
        config["block_size"],
        config["halo_size"],
        form="released",
        head_dim=config.get("dim_head"),
        qkv_bias=config.get("qkv_bias", False),
        scale_positions=config.get("scale_pos_embed"),
        stride=config.get("stride", 1),
    )
    names = {f"{axis}_rel": f"pos_embed.{axis}_rel" for axis in ("height", "width")}
    return run_module(case, module, names=names, **_LAYOUT)
