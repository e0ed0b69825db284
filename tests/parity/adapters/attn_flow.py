"""Flow attention of a sequence to itself, to another, and in the vision backbone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import attention
from attention.flow import FlowCross
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter

_KINDS = ("weight", "bias")
_OUT = {f"proj.{kind}": f"out_projection.{kind}" for kind in _KINDS}


@adapter("attn_flow_cv")
def vision(case: Case) -> dict[str, Tensor]:
    return run_module(case, attention.create("flow", form="vision", **case.config))


@adapter("attn_flow_self")
def own(case: Case) -> dict[str, Tensor]:
    """The case's output is of another width than its input, for which the last layer is exchanged."""
    config = case.config
    module = attention.create(
        "flow", kind="mixer", dim=config["d_input"], num_heads=config["n_heads"], inner_dim=config["d_model"]
    )
    module.proj = nn.Linear(config["d_model"], config["d_output"])
    parts = [f"{name}_projection" for name in ("query", "key", "value")]
    joined = {f"grad.qkv.{kind}": torch.cat([case.expected[f"grad.{p}.{kind}"] for p in parts]) for kind in _KINDS}
    found = run_module(replace(case, expected=case.expected | joined), module, names=_OUT, x="q")
    return _split(found, "qkv", parts)


@adapter("attn_flow_cross")
def cross(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = attention.create(
        "flow", kind="cross", dim=config["d_input"], num_heads=config["n_heads"], inner_dim=config["d_model"]
    ).eval()
    assert isinstance(module, FlowCross)
    attention.load_official(module, case.state)
    q, k, v = (case.inputs[name].clone().requires_grad_() for name in ("q", "k", "v"))
    out = module(q, k, values=v)
    assert isinstance(out, Tensor)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, [q, k, v, *parameters], case.inputs["grad_out"])
    renamed = _OUT | {f"q.{kind}": f"query_projection.{kind}" for kind in _KINDS}
    keys = [f"grad.{renamed.get(name, name)}" for name in ("q", "k", "v", *names)]
    found = {"output.y": out, **dict(zip(keys, gradients, strict=True))}
    return _split(found, "kv", ["key_projection", "value_projection"])


def _split(found: dict[str, Tensor], ours: str, parts: list[str]) -> dict[str, Tensor]:
    for kind in _KINDS:
        pieces = found.pop(f"grad.{ours}.{kind}").chunk(len(parts))
        found |= {f"grad.{part}.{kind}": piece for part, piece in zip(parts, pieces, strict=True)}
    return found
