"""Mixture-of-head attention: full and aggregated, with and without routed heads, and its loss."""

from __future__ import annotations

from torch import Tensor

import attention
from attention.continuous_bias import relative_coordinates
from attention.moh import MixtureOfHeadAttention
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


@adapter("attn_moh_*")
def moh(case: Case) -> dict[str, Tensor]:
    config = case.config
    size = config["input_resolution"]
    module = attention.create(
        "moh",
        dim=config["dim"],
        num_heads=config["num_heads"],
        input_size=size,
        shared_heads=config["shared_head"],
        routed_heads=config["routed_head"],
        form="aggregated" if "sr_ratio" in config else "full",
        window_size=config.get("window_size", 3),
        sr_ratio=config.get("sr_ratio", 1),
    )
    assert isinstance(module, MixtureOfHeadAttention)
    extras: dict[str, Tensor] = {}
    found = run_module(
        case, module, before=lambda x: x.unflatten(1, size), after=lambda y: y.flatten(1, 2), extras=extras
    )
    keys = [side // config.get("sr_ratio", 1) for side in size]
    table, offsets, (rows, columns) = relative_coordinates(size, keys, size)
    index = rows[:, None, :, None] * offsets[1] + columns[None, :, None, :]
    found |= {"output.rel_index": index.flatten(), "output.rel_table": table}
    if extras:
        found["output.aux"] = extras["load_balance"].reshape(1)
    return found
