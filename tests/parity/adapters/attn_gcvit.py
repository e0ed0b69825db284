"""GC ViT's window attention, of windows that are already cut out: each is a map of its own."""

from __future__ import annotations

import torch
from torch import Tensor

import attention
from attention.global_context import GlobalContextAttention
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter

_TABLE = {"relative_position_bias_table": "rel_pos.relative_position_bias_table"}


def _create(case: Case, form: str) -> GlobalContextAttention:
    module = attention.create(
        "global_context",
        dim=case.config["dim"],
        num_heads=case.config["num_heads"],
        window_size=case.config["window_size"],
        form=form,
        own_query=False,
    )
    assert isinstance(module, GlobalContextAttention)
    return module


@adapter("attn_gcvit_local")
def local(case: Case) -> dict[str, Tensor]:
    sides = case.config["window_size"]
    return run_module(
        case,
        _create(case, "local"),
        names=_TABLE,
        before=lambda x: x.unflatten(1, sides),
        after=lambda y: y.flatten(1, 2),
    )


@adapter("attn_gcvit_global")
def shared_query(case: Case) -> dict[str, Tensor]:
    module = _create(case, "global")
    attention.load_official(module, case.state)
    leaves = [case.inputs[name].clone().requires_grad_() for name in ("x", "q_global")]
    out = module.with_query(leaves[0].unflatten(1, case.config["window_size"]), leaves[1]).flatten(1, 2)
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(out, [*leaves, *parameters.values()], case.inputs["grad_out"])
    names = ["x", "q_global", *(_TABLE.get(name, name) for name in parameters)]
    return {"output.y": out} | {f"grad.{name}": g for name, g in zip(names, gradients, strict=True)}
