"""Operators over packed bags: both forms agree with each bag on its own, with gradients, for any bag sizes."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import segment
from kernels.segment import (
    segment_dot,
    segment_ids,
    segment_lengths,
    segment_max,
    segment_softmax,
    segment_sum,
    segment_top_k,
    segment_weighted_sum,
)

SIZES = [[5], [0], [], [1, 0, 7, 0, 3], [0, 0, 2], [33, 1, 64], [1] * 40]
FORMS = ["per_bag", "flat", "auto"]
sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)
forms = pytest.mark.parametrize("form", FORMS)


def bounds(sizes: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(dtype)


def test_lengths_and_ids_follow_from_the_boundaries() -> None:
    cu = bounds([2, 0, 3], torch.int32)
    assert segment_lengths(cu).tolist() == [2, 0, 3]
    assert segment_ids(cu, 5).tolist() == [0, 0, 2, 2, 2]


@sizes
@forms
def test_softmax_is_that_of_each_bag(sizes: list[int], form: segment.Form) -> None:
    scores = torch.randn(3, sum(sizes)) * 20
    expected = torch.cat([part.softmax(-1) for part in scores.split(sizes, -1)], -1) if sizes else scores
    torch.testing.assert_close(segment_softmax(scores, bounds(sizes), form), expected)


@forms
def test_softmax_stays_finite_for_scores_far_apart_and_hidden(form: segment.Form) -> None:
    scores = torch.tensor([[1e4, -1e9, 3.0, -1e9, -1e9]])
    weights = segment_softmax(scores, bounds([2, 1, 2]), form)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0, 1, 0.5, 0.5]]))


@sizes
@forms
def test_sums_are_those_of_each_bag_and_zero_for_an_empty_one(sizes: list[int], form: segment.Form) -> None:
    values, weights = torch.randn(sum(sizes), 5), torch.randn(3, sum(sizes))
    cu = bounds(sizes, torch.int32)
    parts, cuts = values.split(sizes) if sizes else (), weights.split(sizes, -1) if sizes else ()
    total = segment_sum(values, cu, form) if sizes or form == "flat" else values.new_zeros(0, 5)
    weighted = segment_weighted_sum(weights, values, cu, form)
    assert total.shape == (len(sizes), 5)
    assert weighted.shape == (len(sizes), 3, 5)
    for bag, (part, cut) in enumerate(zip(parts, cuts, strict=True)):
        torch.testing.assert_close(total[bag], part.sum(0))
        torch.testing.assert_close(weighted[bag], cut @ part)
        assert part.numel() or not weighted[bag].any()


@sizes
@forms
def test_inner_products_are_with_the_own_bags_queries(sizes: list[int], form: segment.Form) -> None:
    values, queries = torch.randn(sum(sizes), 5), torch.randn(len(sizes), 3, 5)
    scores = segment_dot(queries, values, bounds(sizes), form)
    assert scores.shape == (3, sum(sizes))
    parts, cuts = (values.split(sizes), scores.split(sizes, -1)) if sizes else ((), ())
    for bag, (part, got) in enumerate(zip(parts, cuts, strict=True)):
        torch.testing.assert_close(got, queries[bag] @ part.t())


@sizes
@forms
@pytest.mark.parametrize("largest", [True, False])
def test_top_k_is_that_of_each_bag(sizes: list[int], form: segment.Form, largest: bool) -> None:
    total, k = sum(sizes), 4
    scores = torch.randperm(3 * total).view(3, total).float()
    indices, valid = segment_top_k(scores, bounds(sizes), k, largest, form)
    assert indices.shape == (3, len(sizes), k)
    assert valid.sum(1).tolist() == [min(k, size) for size in sizes]
    assert (indices[:, ~valid] == total).all()
    start = 0
    for bag, size in enumerate(sizes):
        expected = scores[:, start : start + size].topk(min(k, size), largest=largest).indices + start
        assert torch.equal(indices[:, bag, : min(k, size)], expected)
        start += size


def run_softmax(form: segment.Form, cu: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return segment_softmax(a, cu, form)


def run_weighted_sum(form: segment.Form, cu: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return segment_weighted_sum(a, b, cu, form)


def run_sum(form: segment.Form, cu: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return segment_sum(b, cu, form)


def run_dot(form: segment.Form, cu: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return segment_dot(segment_weighted_sum(a, b, cu, form), b, cu, form)


@forms
@pytest.mark.parametrize("operator", [run_softmax, run_weighted_sum, run_sum, run_dot])
def test_gradients_match_finite_differences(operator: Callable[..., Tensor], form: segment.Form) -> None:
    cu = bounds([3, 0, 1, 5])
    a = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    b = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: operator(form, cu, a, b), (a, b))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 2**31))
def test_both_forms_agree_with_gradients(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cu = bounds(sizes)
    outcomes = []
    a = torch.randn(3, sum(sizes), generator=generator)
    b = torch.randn(sum(sizes), 6, generator=generator)
    for form in ("per_bag", "flat"):
        leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
        weights = segment_softmax(leaves[0], cu, form)
        pooled = segment_weighted_sum(weights, leaves[1], cu, form)
        scores = segment_dot(pooled, leaves[1], cu, form)
        (scores.square().sum() + pooled.sum()).backward()
        outcomes.append([weights, pooled, scores, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_flat_form_in_pieces_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(2, 50), torch.randn(50, 8)
    cu = bounds([7, 0, 30, 13])
    whole = [segment_weighted_sum(a, b, cu, "flat"), segment_dot(torch.ones(4, 2, 8), b, cu, "flat")]
    monkeypatch.setattr(segment, "_FLAT_ELEMENTS", 33)
    torch.testing.assert_close(segment_weighted_sum(a, b, cu, "flat"), whole[0])
    torch.testing.assert_close(segment_dot(torch.ones(4, 2, 8), b, cu, "flat"), whole[1])


@forms
def test_uninitialised_memory_never_shows(form: segment.Form) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        weights, values = torch.rand(2, 6, requires_grad=True), torch.randn(6, 3, requires_grad=True)
        cu = bounds([0, 4, 0, 2, 0])
        pooled = segment_weighted_sum(segment_softmax(weights, cu, form), values, cu, form)
        (segment_dot(pooled, values, cu, form).sum() + segment_sum(values, cu, form).sum()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert pooled.isfinite().all()
    assert weights.grad is not None and weights.grad.isfinite().all()
    assert values.grad is not None and values.grad.isfinite().all()


def test_strided_inputs_give_the_same_as_contiguous_ones() -> None:
    values = torch.randn(2, 9, 4)[0].t().contiguous().t()
    weights = torch.randn(9, 3).t()
    cu = bounds([4, 5])
    for form in ("per_bag", "flat"):
        expected = segment_weighted_sum(weights.contiguous(), values.contiguous(), cu, form)
        torch.testing.assert_close(segment_weighted_sum(weights, values, cu, form), expected)


@sizes
def test_the_largest_is_that_of_each_bag(sizes: list[int]) -> None:
    values = torch.randn(sum(sizes), 3)
    highest = segment_max(values, bounds(sizes))
    assert highest.shape == (len(sizes), 3)
    for bag, own in zip(values.split(sizes), highest, strict=True):
        assert torch.equal(own, bag.amax(0) if len(bag) else torch.full((3,), -torch.inf))


@sizes
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_pieces_cut_at_bags_cover_every_row_once(sizes: list[int], rows: int) -> None:
    ids = segment_ids(bounds(sizes), sum(sizes))
    covered = []
    for piece, parts in segment.cut_at_bags(bounds(sizes), sum(sizes), rows):
        assert piece.stop - piece.start <= rows
        for bag, part in parts:
            covered += range(piece.start, piece.stop)[part]
            assert (ids[piece][part] == bag).all()
    assert covered == list(range(sum(sizes)))
