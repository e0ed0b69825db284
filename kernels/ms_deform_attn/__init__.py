"""Multi-scale deformable attention: each query sums bilinear samples at places it has chosen, on several levels.

Zhu et al., Deformable DETR, ICLR 2021 (arXiv:2010.04159), equation 3, without its projections. Where to look and with
which weight is computed from the query by whoever calls this; the operator samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import Choice, choose
from kernels.errors import InputError
from kernels.ms_deform_attn.operator import ms_deform_attn_forward
from kernels.ms_deform_attn.reference import ms_deform_attn_reference
from kernels.operators import autocast_to

__all__ = ["ms_deform_attn", "plan"]

LARGEST_HEAD = 256
Shapes = Sequence[tuple[int, int]] | Tensor


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of bilinear samples of each query's points.

    A map's corners are at 0 and 1, its pixels' centres at (i + 0.5) / size; beyond the map there are zeros. This is
    ``grid_sample`` with ``align_corners=False`` and zero padding.

    Args:
        value: (B, S, H, D), the levels' maps one after the other, each row by row; S is the sum of their sizes.
        spatial_shapes: height and width of each of the L levels, as numbers (a tensor (L, 2) is read back to the host).
        sampling_locations: (B, Q, H, L, P, 2), x then y, as shares of the level's width and height.
        attention_weights: (B, Q, H, L, P), used as they are.

    Returns:
        (B, Q, H * D) in the dtype of ``value``.

    On a GPU the gradient of ``value`` is summed by float32 atomics, whose order changes the last bits from run to run;
    under ``torch.use_deterministic_algorithms(True)`` it is summed in a fixed order after a sort.

    Raises:
        InputError: shapes do not fit, or a backend is forced that cannot serve.
    """
    choice = plan(value, spatial_shapes, sampling_locations, attention_weights, backend=backend)
    # Half precision cannot tell neighbouring pixels of a large map apart: locations keep their dtype.
    (value,) = autocast_to(value)
    sizes = _sizes(spatial_shapes)
    if choice.backend == "reference":
        return ms_deform_attn_reference(value, sizes, sampling_locations, attention_weights)
    flat = [n for size in sizes for n in size]
    return ms_deform_attn_forward(value, flat, sampling_locations, attention_weights, choice.backend)


def plan(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    backend: str = "auto",
) -> Choice:
    """Check the arguments of :func:`ms_deform_attn` and say which implementation serves them."""
    sizes = _sizes(spatial_shapes)
    given, weights = tuple(sampling_locations.shape), tuple(attention_weights.shape)
    if value.dim() != 4 or len(given) != 6 or given != (*weights, 2) or (given[0], given[2]) != value.shape[::2]:
        raise InputError(
            "ms_deform_attn takes value (B, S, H, D), sampling_locations (B, Q, H, L, P, 2) and attention_weights "
            f"(B, Q, H, L, P); got {tuple(value.shape)}, {given}, {weights}."
        )
    if len(sizes) != given[3] or sum(map(math.prod, sizes)) != value.shape[1]:
        raise InputError(
            f"ms_deform_attn: spatial_shapes {sizes} are {len(sizes)} levels of {sum(map(math.prod, sizes))} tokens in "
            f"all; the locations have {given[3]} levels and value {value.shape[1]} tokens."
        )
    width = value.shape[3]
    refusal = f"heads are {width} wide and the kernels take up to {LARGEST_HEAD}" if width > LARGEST_HEAD else None
    return choose("ms_deform_attn", backend, (value, sampling_locations, attention_weights), refusal)


def _sizes(spatial_shapes: Shapes) -> list[tuple[int, int]]:
    rows = spatial_shapes.tolist() if isinstance(spatial_shapes, torch.Tensor) else spatial_shapes
    return [(int(height), int(width)) for height, width in rows]
