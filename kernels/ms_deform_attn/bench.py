"""Deformable sampling beside the form that every detector without a compiled extension uses."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from kernels.measure import Case, Contestant
from kernels.ms_deform_attn import ms_deform_attn

# Feature levels of an 800 x 1066 image at strides 8, 16, 32 and 64.
_LEVELS = [(100, 134), (50, 67), (25, 34), (13, 17)]
_SMALL = [(40, 40), (20, 20), (10, 10), (5, 5)]


def cases(device: torch.device) -> Iterator[Case]:
    """A decoder's few queries and an encoder's, one for each token."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, sizes, queries, batch in (
        ("decoder, 900 queries", _LEVELS, 900, 1),
        ("encoder of 40 x 40 .. 5 x 5", _SMALL, None, 2),
        ("encoder of 100 x 134 .. 13 x 17", _LEVELS, None, 4 if device.type == "cuda" else 1),
    ):
        yield _case(name, sizes, queries, batch, device, dtype)


def _case(
    name: str, sizes: list[tuple[int, int]], queries: int | None, batch: int, device: torch.device, dtype: torch.dtype
) -> Case:
    heads, width, points, tokens = 8, 32, 4, sum(map(math.prod, sizes))
    queries = queries or tokens
    value = torch.randn(batch, tokens, heads, width, device=device, dtype=dtype, requires_grad=True)
    locations = torch.rand(batch, queries, heads, len(sizes), points, 2, device=device, requires_grad=True)
    weights = torch.rand(batch, queries, heads, len(sizes), points, device=device).flatten(3).softmax(3)
    weights = weights.view(batch, queries, heads, len(sizes), points).requires_grad_()
    leaves = [value, locations, weights]
    samples = batch * queries * heads * len(sizes) * points
    contestants = [
        Contestant("fovea", lambda: ms_deform_attn(value, sizes, locations, weights), leaves),
        Contestant(
            "grid_sample", lambda: ms_deform_attn(value, sizes, locations, weights, backend="reference"), leaves
        ),
    ]
    moved = value.numel() * value.element_size() + samples * 3 * 4 + batch * queries * heads * width * 4
    return Case(
        f"ms_deform_attn, {name}, batch {batch}, {heads} heads of {width}",
        contestants,
        "grid_sample",
        flops=samples * 4 * 2 * width,
        bytes=moved,
        tolerance=2e-2 if dtype == torch.bfloat16 else 2e-3,
    )
