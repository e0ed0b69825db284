"""Operators over packed bags: softmax, sums, weighted sums, inner products and top-k within each bag.

``B`` bags with ``T`` instances in all lie one after the other; ``cu_seqlens (B + 1,)`` (int32 or int64, starting at 0
and ending at ``T``) holds their boundaries, and bags may be empty. Scores and weights are ``(R, T)``, one row per
attention branch, head or class; instance features are ``(T, H)``.

Each operator has two forms with the same result. ``"per_bag"`` cuts the batch at its boundaries and calls the dense
operator on each piece: the definition of correct, and the fast form for slides, whose bags hold thousands of
instances. ``"flat"`` handles all instances at once through their bag numbers: the fast form for many small bags.
``"auto"`` chooses by the mean bag size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Form = Literal["auto", "per_bag", "flat"]

# Mean instances per bag from which a loop over bags beats the flat form (measured on two cores, H = 64 to 512).
_LONG_BAG = 24
# Elements of the largest temporary of the flat form; longer batches are handled in pieces.
_FLAT_ELEMENTS = 1 << 22


def segment_lengths(cu_seqlens: Tensor) -> Tensor:
    """Instances in each bag, (B,)."""
    return cu_seqlens.diff()


def segment_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """Bag number of each of the ``total`` instances, (T,) int64."""
    lengths = segment_lengths(cu_seqlens)
    bags = torch.arange(lengths.numel(), device=cu_seqlens.device)
    return bags.repeat_interleave(lengths, output_size=total)


def segment_softmax(scores: Tensor, cu_seqlens: Tensor, form: Form = "auto") -> Tensor:
    """Softmax of ``scores (R, T)`` within each bag, (R, T)."""
    if choose_form(form, cu_seqlens, scores.shape[1]) == "per_bag":
        if cu_seqlens.numel() == 2:
            return scores.softmax(-1)
        return torch.cat([bag.softmax(-1) for bag in scores.split(_sizes(cu_seqlens), -1)], -1)
    ids = segment_ids(cu_seqlens, scores.shape[1])
    shape = (scores.shape[0], cu_seqlens.numel() - 1)
    # A softmax does not change when its scores are shifted, so the maximum needs no gradient.
    highest = scores.new_full(shape, -torch.inf).scatter_reduce(1, ids.expand_as(scores), scores.detach(), "amax")
    exponentials = (scores - highest[:, ids]).exp()
    return exponentials / scores.new_zeros(shape).index_add(1, ids, exponentials)[:, ids]


def segment_max(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Largest of ``values (T, H)`` within each bag, (B, H), without a gradient; -inf for an empty bag.

    It has one form: for few columns the flat one is never slower.
    """
    values = values.detach()
    if cu_seqlens.numel() == 2 and len(values):
        return values.amax(0, keepdim=True)
    out = values.new_full((cu_seqlens.numel() - 1, values.shape[1]), -torch.inf)
    ids = segment_ids(cu_seqlens, len(values))
    return out.scatter_reduce_(0, ids[:, None].expand_as(values), values, "amax")


def segment_sum(values: Tensor, cu_seqlens: Tensor, form: Form = "auto") -> Tensor:
    """Sum of ``values (T, H)`` within each bag, (B, H); zeros for an empty bag."""
    if choose_form(form, cu_seqlens, len(values)) == "per_bag":
        return torch.stack([bag.sum(0) for bag in values.split(_sizes(cu_seqlens))])
    out = values.new_zeros(cu_seqlens.numel() - 1, values.shape[1])
    return out.index_add(0, segment_ids(cu_seqlens, len(values)), values)


def segment_weighted_sum(weights: Tensor, values: Tensor, cu_seqlens: Tensor, form: Form = "auto") -> Tensor:
    """Sum over each bag of ``weights (R, T)`` times ``values (T, H)``, (B, R, H); zeros for an empty bag."""
    return _WeightedSum.apply(weights.to(values.dtype), values, cu_seqlens, choose_form(form, cu_seqlens, len(values)))


def segment_dot(queries: Tensor, values: Tensor, cu_seqlens: Tensor, form: Form = "auto") -> Tensor:
    """Inner product of every instance of ``values (T, H)`` with its own bag's rows of ``queries (B, R, H)``, (R, T)."""
    return _Dot.apply(queries.to(values.dtype), values, cu_seqlens, choose_form(form, cu_seqlens, len(values)))


@torch.no_grad()
def segment_top_k(
    scores: Tensor, cu_seqlens: Tensor, k: int, largest: bool = True, form: Form = "auto"
) -> tuple[Tensor, Tensor]:
    """Indices of the ``k`` largest (or smallest) ``scores (R, T)`` of each bag, best first.

    Returns:
        indices: (R, B, k) int64 into ``T``; where a bag holds fewer than ``k`` instances the rest is ``T``, one past
            the last.
        valid: (B, k) bool, false at that rest.
    """
    rows, total = scores.shape
    lengths = segment_lengths(cu_seqlens)
    valid = torch.arange(k, device=scores.device) < lengths[:, None]
    if choose_form(form, cu_seqlens, total) == "per_bag":
        indices = torch.full((rows, lengths.numel(), k), total, device=scores.device)
        start = 0
        for bag, size in enumerate(_sizes(cu_seqlens) if lengths.numel() != 1 else [total]):
            found = scores[:, start : start + size].topk(min(k, size), dim=1, largest=largest).indices
            indices[:, bag, : found.shape[1]] = found + start
            start += size
        return indices, valid
    # Sorting by score and then, stably, by bag leaves every bag sorted in its own place.
    by_score = scores.argsort(dim=1, descending=largest, stable=True)
    ids = segment_ids(cu_seqlens, total)
    by_bag = by_score.gather(1, ids[by_score].argsort(dim=1, stable=True))
    by_bag = torch.cat([by_bag, by_bag.new_full((rows, 1), total)], 1)
    places = (cu_seqlens[:-1, None] + torch.arange(k, device=scores.device)).where(valid, total)
    return by_bag[:, places], valid


# The three products below are each other's gradients: with weights (R, T), values (T, H) and queries (B, R, H),
# d pool / d weights is dot, d pool / d values is spread, and so on round.


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor, cu_seqlens: Tensor, form: Form) -> Tensor:
        ctx.save_for_backward(weights, values, cu_seqlens)
        ctx.form = form
        return pool(weights, values, cu_seqlens, form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, values, cu_seqlens = ctx.saved_tensors
        d_weights = dot(grad, values, cu_seqlens, ctx.form) if ctx.needs_input_grad[0] else None
        d_values = spread(weights, grad, cu_seqlens, ctx.form) if ctx.needs_input_grad[1] else None
        return d_weights, d_values, None, None


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, values: Tensor, cu_seqlens: Tensor, form: Form) -> Tensor:
        ctx.save_for_backward(queries, values, cu_seqlens)
        ctx.form = form
        return dot(queries, values, cu_seqlens, form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, values, cu_seqlens = ctx.saved_tensors
        d_queries = pool(grad, values, cu_seqlens, ctx.form) if ctx.needs_input_grad[0] else None
        d_values = spread(grad, queries, cu_seqlens, ctx.form) if ctx.needs_input_grad[1] else None
        return d_queries, d_values, None, None


def pool(weights: Tensor, values: Tensor, cu_seqlens: Tensor, form: Form) -> Tensor:
    """:func:`segment_weighted_sum` without a gradient, (B, R, H)."""
    bags, rows, width = cu_seqlens.numel() - 1, weights.shape[0], values.shape[1]
    if form == "per_bag":
        out = values.new_empty(bags, rows, width)
        for bag, (start, end) in enumerate(bounds(cu_seqlens, len(values))):
            torch.mm(weights[:, start:end], values[start:end], out=out[bag])
        return out
    out = values.new_zeros(bags, rows * width)
    ids = segment_ids(cu_seqlens, len(values))
    for part in _parts(len(values), rows * width):
        out.index_add_(0, ids[part], (weights[:, part].t()[:, :, None] * values[part, None]).flatten(1))
    return out.view(bags, rows, width)


def dot(queries: Tensor, values: Tensor, cu_seqlens: Tensor, form: Form) -> Tensor:
    """:func:`segment_dot` without a gradient, (R, T)."""
    rows, width = queries.shape[1:]
    out = values.new_empty(len(values), rows)  # tall and narrow: three times faster than a wide product here
    if form == "per_bag":
        for bag, (start, end) in enumerate(bounds(cu_seqlens, len(values))):
            torch.mm(values[start:end], queries[bag].t(), out=out[start:end])
        return out.t()
    ids = segment_ids(cu_seqlens, len(values))
    for part in _parts(len(values), rows * width):
        out[part] = (values[part, None] * queries[ids[part]]).sum(-1)
    return out.t()


def spread(weights: Tensor, queries: Tensor, cu_seqlens: Tensor, form: Form) -> Tensor:
    """Sum over rows of ``weights (R, T)`` times each instance's own bag's ``queries (B, R, H)``, (T, H)."""
    rows, width = queries.shape[1:]
    total = weights.shape[1]
    out = queries.new_empty(total, width)
    if form == "per_bag":
        for bag, (start, end) in enumerate(bounds(cu_seqlens, total)):
            torch.mm(weights[:, start:end].t(), queries[bag], out=out[start:end])
        return out
    ids = segment_ids(cu_seqlens, total)
    for part in _parts(total, rows * width):
        out[part] = (weights[:, part].t()[:, :, None] * queries[ids[part]]).sum(1)
    return out


def choose_form(form: Form, cu_seqlens: Tensor, total: int) -> Form:
    """The form to use: ``form`` itself unless it is ``"auto"``."""
    bags = cu_seqlens.numel() - 1
    if bags == 0:
        return "flat"  # nothing to cut
    if form != "auto":
        return form
    return "per_bag" if bags == 1 or total >= _LONG_BAG * bags else "flat"


def _sizes(cu_seqlens: Tensor) -> list[int]:
    return segment_lengths(cu_seqlens).tolist()


def bounds(cu_seqlens: Tensor, total: int) -> list[tuple[int, int]]:
    """First and one-past-last instance of each bag; a single bag needs no look at the tensor (no device sync)."""
    if cu_seqlens.numel() == 2:
        return [(0, total)]
    edges = cu_seqlens.tolist()
    return list(pairwise(edges))


def cut_at_bags(cu_seqlens: Tensor, total: int, rows: int) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Pieces of ``rows`` rows that cover ``total``, each with the bags in it and where within the piece these lie."""
    edges = bounds(cu_seqlens, total)
    bag = 0
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        parts, here = [], start
        while here < stop:
            while edges[bag][1] <= here:
                bag += 1
            end = min(edges[bag][1], stop)
            parts.append((bag, slice(here - start, end - start)))
            here = end
        yield slice(start, stop), parts


def _parts(total: int, width: int) -> list[slice]:
    step = max(1, _FLAT_ELEMENTS // max(1, width))
    return [slice(start, start + step) for start in range(0, total, step)]
