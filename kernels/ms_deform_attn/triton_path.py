"""Deformable sampling in Triton: launches of :mod:`kernels.ms_deform_attn.triton_kernels`."""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
from torch import Tensor

from kernels.launch import Config, interpreting, launch
from kernels.ms_deform_attn import eager, triton_kernels

_NUMBERS = 512  # of a program's tile of queries by channels


def forward(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """(B, Q, H * D)."""
    value = _dense_rows(value)
    batch, queries, heads = weights.shape[:3]
    out = value.new_empty(batch, queries, heads * value.shape[3])
    if value.shape[1] == 0:
        return out.zero_()
    launch(
        triton_kernels.sample,
        lambda c: (triton.cdiv(queries, c["BLOCK"]), batch * heads),
        {"value": value, **_operands(value, sizes, locations, weights), **_strides(value), "out": out},
        _configs(value),
    )
    return out


def backward(
    grad: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights."""
    value = _dense_rows(value)
    batch, queries, heads = weights.shape[:3]
    d_locations, d_weights = locations.new_zeros(locations.shape), weights.new_zeros(weights.shape)
    if value.shape[1] == 0:
        return value.new_zeros(value.shape), d_locations, d_weights
    operands = _operands(value, sizes, locations, weights)
    launch(
        triton_kernels.point_gradients,
        lambda c: (triton.cdiv(queries, c["BLOCK"]), batch * heads),
        {
            "value": value,
            **operands,
            **_strides(value),
            "grad": grad,
            "d_locations": d_locations,
            "d_weights": d_weights,
        },
        _configs(value),
    )
    if torch.are_deterministic_algorithms_enabled():
        return eager.value_gradient(grad, value, sizes, locations, weights), d_locations, d_weights
    d_value = value.new_zeros(value.shape, dtype=torch.float32)
    launch(
        triton_kernels.value_gradient,
        lambda c: (triton.cdiv(queries, c["BLOCK"]), batch * heads),
        {**operands, "grad": grad, "d_value": d_value, "tokens": value.shape[1]},
        _configs(value)[:1],  # it adds to what it finds: tuning would add more than once
    )
    return d_value.to(value.dtype), d_locations, d_weights


def _dense_rows(value: Tensor) -> Tensor:
    return value if value.stride(3) == 1 else value.contiguous()


def _strides(value: Tensor) -> dict[str, int]:
    return {"value_image": value.stride(0), "value_token": value.stride(1), "value_head": value.stride(2)}


def _operands(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> dict[str, object]:
    tokens = [h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True)]
    starts = [0, *accumulate(tokens)][:-1]
    table = [n for level in zip(sizes[::2], sizes[1::2], starts, strict=True) for n in level]
    return {
        "sizes": torch.tensor(table, dtype=torch.int32, device=value.device),
        "locations": locations.contiguous(),
        "weights": weights.contiguous(),
        "queries": weights.shape[1],
        "levels": weights.shape[3],
        "points": weights.shape[4],
        "HEADS": value.shape[2],
        "D": value.shape[3],
        "BLOCK_D": triton.next_power_of_2(max(value.shape[3], 1)),
    }


def _configs(value: Tensor) -> list[Config]:
    if interpreting():
        return [Config({"BLOCK": 16})]
    # The places of 64 atomic sums may not all fit the registers at odd widths.
    return [Config({"BLOCK": max(_NUMBERS // triton.next_power_of_2(value.shape[3]), 1)}, 4, 1, spills=16)]
