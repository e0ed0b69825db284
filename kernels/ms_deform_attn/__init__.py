"""Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159): a few bilinear samples of a feature pyramid.

Where each query looks and how it weighs what it finds are given; the operator samples and sums. Released code samples
each level with ``grid_sample``, which writes every sample of every channel to memory before they are summed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.backend import Choice, choose
from kernels.errors import InputError
from kernels.ms_deform_attn.operator import ms_deform_attn_forward
from kernels.ms_deform_attn.reference import ms_deform_attn_reference
from kernels.operators import autocast_to

__all__ = ["ms_deform_attn", "plan"]

LARGEST_HEAD = 256
Shapes = Sequence[tuple[int, int]] | Tensor
Starts = Sequence[int] | Tensor


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    level_start_index: Starts | None = None,
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of bilinear samples of a pyramid.

    A sample at (x, y) of a level (H_l, W_l) is what ``grid_sample`` gives with ``align_corners=False`` and zero
    padding: pixel centres lie at (i + 1/2) / W_l, and what lies outside is 0.

    On a GPU the gradient of ``value`` is summed with float32 atomics, in any order, unless
    ``torch.use_deterministic_algorithms`` is on: then samples are sorted by cell and summed in order, which is slower.
    Everything else, and all of the PyTorch path, is the same in every run.

    Args:
        value: (B, S, H, D), the levels' pixels row by row, one level after the other.
        spatial_shapes: (height, width) of each of the L levels. Plain integers are best: a tensor (L, 2) is read back,
            which waits for a GPU and which ``torch.compile`` cannot capture in one graph.
        sampling_locations: (B, Q, H, L, P, 2), x before y, each 0 to 1 across its level; finite.
        attention_weights: (B, Q, H, L, P); they need not sum to 1.
        level_start_index: where each level starts in S; by default right after the one before.

    Returns:
        (B, Q, H * D) in the dtype of ``value``. Positions and weights are used in float32 (float64 for float64).

    Raises:
        InputError: shapes do not fit, or a backend is forced that cannot serve.
    """
    choice = plan(
        value,
        spatial_shapes,
        sampling_locations,
        attention_weights,
        level_start_index=level_start_index,
        backend=backend,
    )
    (value,) = autocast_to(value)
    shapes, starts = _levels(spatial_shapes, level_start_index)
    if choice.backend == "reference":
        return ms_deform_attn_reference(value, sampling_locations, attention_weights, shapes, starts)
    flat = [side for shape in shapes for side in shape]
    out = ms_deform_attn_forward(value, sampling_locations, attention_weights, flat, starts, choice.backend)
    return out.flatten(2)


def plan(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    level_start_index: Starts | None = None,
    backend: str = "auto",
) -> Choice:
    """Check the arguments of :func:`ms_deform_attn` and say which implementation serves them."""
    shapes, starts = _levels(spatial_shapes, level_start_index)
    if value.dim() != 4 or sampling_locations.dim() != 6 or attention_weights.shape != sampling_locations.shape[:-1]:
        raise InputError(
            "ms_deform_attn takes value (B, S, H, D), sampling_locations (B, Q, H, L, P, 2) and attention_weights "
            f"(B, Q, H, L, P); got {tuple(value.shape)}, {tuple(sampling_locations.shape)}, "
            f"{tuple(attention_weights.shape)}."
        )
    batch, _, heads, levels, _, two = sampling_locations.shape
    if (batch, heads, levels, two) != (value.shape[0], value.shape[2], len(shapes), 2):
        raise InputError(
            f"ms_deform_attn: sampling_locations {tuple(sampling_locations.shape)} do not fit value "
            f"{tuple(value.shape)} with {len(shapes)} levels."
        )
    if len(starts) != len(shapes) or any(min(shape) < 1 for shape in shapes):
        raise InputError(
            f"ms_deform_attn: {shapes} with starts {starts} are not one (height, width) and start a level."
        )
    ends = [start + height * width for start, (height, width) in zip(starts, shapes, strict=True)]
    if min(starts, default=0) < 0 or max(ends, default=0) > value.shape[1]:
        raise InputError(
            f"ms_deform_attn: levels {shapes} at {starts} reach beyond the {value.shape[1]} positions of value."
        )
    refusal = None
    if value.shape[3] > LARGEST_HEAD:
        refusal = f"heads are {value.shape[3]} wide and the kernels take up to {LARGEST_HEAD}"
    elif max(value.shape[:3].numel(), sampling_locations.shape[:3].numel()) >= 2**31:
        refusal = "the kernels count heads of queries and of positions with 31 bits"
    return choose("ms_deform_attn", backend, (value, sampling_locations, attention_weights), refusal)


def _levels(spatial_shapes: Shapes, level_start_index: Starts | None) -> tuple[list[tuple[int, int]], list[int]]:
    rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    if any(len(row) != 2 for row in rows):
        raise InputError(f"ms_deform_attn: spatial_shapes must be one (height, width) a level; got {rows}.")
    shapes = [(row[0], row[1]) for row in rows]
    if level_start_index is not None:
        given = level_start_index.tolist() if isinstance(level_start_index, Tensor) else level_start_index
        return shapes, list(given)
    starts = [0]
    for height, width in shapes:
        starts.append(starts[-1] + height * width)
    return shapes, starts[:-1]
