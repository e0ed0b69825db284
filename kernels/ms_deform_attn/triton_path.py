"""Deformable sampling in Triton: launches of :mod:`kernels.ms_deform_attn.triton_kernels`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.launch import Config, interpreting, launch
from kernels.ms_deform_attn.sampling import levels, place, sort_by_cell
from kernels.ms_deform_attn.triton_kernels import (
    gather_gradient,
    sample_gradients,
    sample_values,
    scatter_gradient,
)


def forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], starts: list[int]) -> Tensor:
    """Output (B, Q, H, D)."""
    value = value if value.stride(3) == 1 else value.contiguous()
    locations, weights = locations.contiguous(), weights.contiguous()
    out = value.new_empty(*locations.shape[:3], value.shape[3])
    _launch(sample_values, value, locations, weights, shapes, starts, **_strides(value), out=out)
    return out


def backward(
    grad_out: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], starts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights; the incoming gradient (B, Q, H, D) is contiguous."""
    value = value if value.stride(3) == 1 else value.contiguous()
    locations, weights = locations.contiguous(), weights.contiguous()
    d_locations, d_weights = torch.empty_like(locations), torch.empty_like(weights)
    _launch(
        sample_gradients,
        value,
        locations,
        weights,
        shapes,
        starts,
        **_strides(value),
        grad_out=grad_out,
        d_locations=d_locations,
        d_weights=d_weights,
    )
    if torch.are_deterministic_algorithms_enabled():
        return gather_values(grad_out, value, locations, weights, shapes, starts), d_locations, d_weights
    return scatter_values(grad_out, value, locations, weights, shapes, starts), d_locations, d_weights


def scatter_values(
    grad_out: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], starts: list[int]
) -> Tensor:
    """Gradient of the values with atomics. The kernel adds to what it finds: it has one configuration, so that it is
    never launched twice to be timed."""
    d_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    _launch(
        scatter_gradient,
        value,
        locations,
        weights,
        shapes,
        starts,
        grad_out=grad_out,
        d_value=d_value,
        positions=value.shape[1],
    )
    return d_value.to(value.dtype)


def gather_values(
    grad_out: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], starts: list[int]
) -> Tensor:
    """Gradient of the values in a fixed order: samples are sorted by cell, each pixel sums those around it."""
    d_value = value.new_empty(value.shape)
    heads = value.shape[2]
    about = levels(tuple(shapes), tuple(starts), heads, locations.shape[4], value.device, torch.float32)
    at = place(locations.flatten(2, 4).float(), about)
    order, begins = sort_by_cell(at.x, at.y, about, heads)
    _launch(
        gather_gradient,
        value,
        locations,
        weights,
        shapes,
        starts,
        # 32 bits where they do: dividing 64-bit numbers takes a call.
        order=order.to(torch.int32) if order.numel() < 2**31 else order,
        begins=begins,
        grad_out=grad_out,
        d_value=d_value,
        total=value.shape[:3].numel(),
        positions=value.shape[1],
        cells=about.cells,
    )
    return d_value


def _launch(
    kernel: Any,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: list[int],
    starts: list[int],
    **own: Any,
) -> None:
    """Launch over rows: heads of queries, or of pixels where ``total`` is given."""
    batch, queries, heads, level_count, points = weights.shape
    width = value.shape[3]
    known = {
        "value": value,
        "locations": locations,
        "weights": weights,
        "levels": _table(tuple(shapes), tuple(starts), value.device),
        "total": batch * queries * heads,
        "queries": queries,
        "level_count": level_count,
        "points": points,
        "HEADS": heads,
        "D": width,
        "BLOCK_D": max(triton.next_power_of_2(width), 8),
        **own,
    }
    arguments = {name: known[name] for name in kernel.arg_names if name in known}
    configs = _configs(width, spills=8 if kernel is gather_gradient else 0)  # one address, of many that loop
    launch(kernel, lambda c: (triton.cdiv(known["total"], c["BLOCK"]),), arguments, configs)


def _strides(value: Tensor) -> dict[str, int]:
    return {"v_batch": value.stride(0), "v_row": value.stride(1), "v_head": value.stride(2)}


@functools.lru_cache(maxsize=64)
def _table(shapes: tuple[int, ...], starts: tuple[int, ...], device: torch.device) -> Tensor:
    """(L, 4) int32: height, width, first pixel and first cell of each level; kept, copying it to a GPU waits."""
    rows, cells = [], 0
    for height, width, start in zip(shapes[::2], shapes[1::2], starts, strict=True):
        rows.append([height, width, start, cells])
        cells += (height + 1) * (width + 1)
    return torch.tensor(rows, dtype=torch.int32).to(device)


def _configs(width: int, spills: int) -> list[Config]:
    """Eight channels of a row to a thread: one or two full loads; nothing is multiplied by tensor cores."""
    if interpreting():
        return [Config({"BLOCK": 32})]
    return [Config({"BLOCK": max(4, 1024 // max(triton.next_power_of_2(width), 8))}, 4, 1, spills)]
