"""Deformable sampling: every backend against brute force and ``grid_sample``, at odd sizes and beyond the borders."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.backend import explain
from kernels.errors import InputError
from kernels.ms_deform_attn import ms_deform_attn
from tests.kernels.contract import (
    assert_any_incoming_gradient,
    assert_compiles,
    assert_gradcheck,
    assert_matches,
    assert_opcheck,
    assert_runs_under_autocast,
    poisoned,
)

BACKENDS = ["torch", "triton"]
CASES = {
    "two levels": ([(5, 7), (3, 2)], 2, 11, 2, 8, 3),
    "one pixel": ([(1, 1), (4, 1), (1, 5)], 1, 6, 1, 4, 2),
    "odd width": ([(6, 5)], 1, 19, 3, 20, 1),
    "narrow": ([(4, 4), (2, 2)], 2, 3, 1, 1, 4),
}


def inputs(
    sizes: list[tuple[int, int]], batch: int, queries: int, heads: int, width: int, points: int
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = sum(math.prod(size) for size in sizes)
    value = torch.randn(batch, tokens, heads, width)
    locations = torch.rand(batch, queries, heads, len(sizes), points, 2) * 1.6 - 0.3
    weights = torch.randn(batch, queries, heads, len(sizes), points)
    return value, locations, weights


def sampling(value: Tensor, locations: Tensor, weights: Tensor, sizes: object, backend: str = "auto") -> Tensor:
    return ms_deform_attn(value, sizes, locations, weights, backend=backend)  # type: ignore[arg-type]


def brute_force(value: Tensor, locations: Tensor, weights: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    batch, queries, heads, levels, points, _ = locations.shape
    out = value.new_zeros(batch, queries, heads, value.shape[3])
    for b, q, h, level, p in itertools.product(*map(range, (batch, queries, heads, levels, points))):
        rows, columns = sizes[level]
        start = sum(math.prod(size) for size in sizes[:level])
        x, y = (locations[b, q, h, level, p] * torch.tensor([columns, rows]) - 0.5).tolist()
        for row, column in itertools.product(range(rows), range(columns)):
            share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
            out[b, q, h] += weights[b, q, h, level, p] * share * value[b, start + row * columns + column, h]
    return out.flatten(2)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_bilinear_interpolation(case: str) -> None:
    sizes, *rest = CASES[case]
    tensors = [t.double() for t in inputs(sizes, *rest)]
    torch.testing.assert_close(sampling(*tensors, sizes, "reference"), brute_force(*tensors, sizes))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_it_matches_the_reference(case: str, backend: str) -> None:
    sizes, *rest = CASES[case]
    call = partial(sampling, sizes=sizes)
    tensors = inputs(sizes, *rest)
    # A location moves a sample by as many pixels as the map is wide.
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), tensors, scale=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_number_of_reads_is_taken_in_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.ms_deform_attn import eager

    monkeypatch.setattr(eager, "READS_AT_ONCE", 100)
    sizes = [(5, 4), (2, 3)]
    call = partial(sampling, sizes=sizes)
    tensors = inputs(sizes, 2, 13, 2, 6, 2)
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), tensors, scale=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_far_away_give_nothing_and_get_nothing(backend: str) -> None:
    sizes = [(4, 3)]
    value, locations, weights = inputs(sizes, 1, 5, 1, 4, 2)
    locations[:] = torch.tensor([1e9, -1e9])
    locations.requires_grad_()
    out = sampling(value, locations, weights, sizes, backend)
    assert (out == 0).all()
    assert (torch.autograd.grad(out.sum(), locations)[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixel_centres_give_the_pixels(backend: str) -> None:
    rows, columns = 3, 4
    value = torch.randn(1, rows * columns, 1, 5)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
    locations = ((grid + 0.5) / torch.tensor([columns, rows])).view(1, -1, 1, 1, 1, 2)
    out = sampling(value, locations, torch.ones(1, 12, 1, 1, 1), [(rows, columns)], backend)
    torch.testing.assert_close(out, value[:, :, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["queries", "batch", "levels"])
def test_nothing_to_sample(empty: str, backend: str) -> None:
    sizes = [] if empty == "levels" else [(3, 2)]
    tensors = inputs(sizes, 0 if empty == "batch" else 2, 0 if empty == "queries" else 4, 2, 8, 2)
    leaves = [t.requires_grad_() for t in tensors]
    out = sampling(*leaves, sizes, backend)
    assert out.shape == (tensors[1].shape[0], tensors[1].shape[1], 16) and (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_and_what_lies_around_it(backend: str) -> None:
    sizes = [(4, 5), (2, 2)]
    value, locations, weights = inputs(sizes, 2, 7, 2, 8, 2)
    call = partial(sampling, sizes=sizes)
    heads_first = value.transpose(1, 2).contiguous().transpose(1, 2)
    for layout in (poisoned(value), heads_first, value.transpose(2, 3).contiguous().transpose(2, 3)):
        tensors = [layout, poisoned(locations), poisoned(weights)]
        assert_matches(partial(call, backend=backend), partial(call, backend="reference"), tensors, scale=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_is_blind_to_the_others(backend: str) -> None:
    sizes = [(4, 5)]
    value, locations, weights = inputs(sizes, 3, 6, 2, 8, 2)
    before = sampling(value, locations, weights, sizes, backend)
    value[1] = torch.nan
    after = sampling(value, locations, weights, sizes, backend)
    assert torch.equal(before[[0, 2]], after[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_an_operator_to_the_compiler(backend: str) -> None:
    sizes = [(4, 3), (2, 2)]
    call = partial(sampling, sizes=sizes, backend=backend)
    tensors = inputs(sizes, 1, 5, 2, 4, 2)
    assert_compiles(call, tensors)
    assert_any_incoming_gradient(call, tensors)


def test_it_is_registered_properly() -> None:
    value, locations, weights = (t.requires_grad_() for t in inputs([(4, 3), (2, 2)], 2, 5, 2, 4, 2))
    assert_opcheck(torch.ops.fovea.ms_deform_attn.default, (value, [4, 3, 2, 2], locations, weights, "torch"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_numerical_gradients(backend: str) -> None:
    sizes = [(3, 2), (2, 3)]
    value, locations, weights = inputs(sizes, 1, 4, 2, 2, 2)
    # Away from pixel centres, where bilinear interpolation has a kink.
    pixels = locations.double() * torch.tensor([[2, 3], [3, 2]])[:, None]
    near = (pixels - 0.5 - (pixels - 0.5).round()).abs() < 0.05
    shares = ((pixels + 0.1 * near) / torch.tensor([[2, 3], [3, 2]])[:, None]).double()
    assert_gradcheck(partial(sampling, sizes=sizes, backend=backend), [value, shares, weights])


def test_the_fixed_order_of_summation_gives_the_same_gradient() -> None:
    from kernels.ms_deform_attn import eager

    sizes = [(6, 5), (3, 3)]
    value, locations, weights = inputs(sizes, 2, 30, 2, 8, 3)
    grad = torch.randn(2, 30, 16)
    flat = [n for size in sizes for n in size]
    fixed = eager.value_gradient(grad, value, flat, locations, weights)
    torch.testing.assert_close(fixed, eager.backward(grad, value, flat, locations, weights)[0])
    value.requires_grad_()
    with torch.random.fork_rng():
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            runs = [
                torch.autograd.grad(sampling(value, locations, weights, sizes, "triton"), value, grad)[0]
                for _ in range(2)
            ]
        finally:
            torch.use_deterministic_algorithms(before)
    assert torch.equal(*runs)
    torch.testing.assert_close(runs[0], fixed)


def test_autocast_keeps_locations_exact() -> None:
    sizes = [(64, 64)]
    tensors = inputs(sizes, 1, 20, 2, 8, 2)
    assert_runs_under_autocast(partial(sampling, sizes=sizes), tensors, torch.bfloat16)


def test_half_precision_is_near_float64() -> None:
    sizes = [(7, 6), (3, 3)]
    value, locations, weights = inputs(sizes, 1, 20, 2, 8, 2)
    call = partial(sampling, sizes=sizes)
    for backend in BACKENDS:
        half = [value.half(), locations, weights]
        assert_matches(partial(call, backend=backend), partial(call, backend="reference"), half, scale=2)


def test_shapes_may_be_a_tensor() -> None:
    sizes = [(4, 3), (2, 2)]
    tensors = inputs(sizes, 1, 5, 2, 4, 2)
    assert torch.equal(sampling(*tensors, torch.tensor(sizes)), sampling(*tensors, sizes))


def test_what_does_not_fit_is_said_with_its_numbers() -> None:
    sizes = [(4, 3), (2, 2)]
    value, locations, weights = inputs(sizes, 1, 5, 2, 4, 2)
    with pytest.raises(InputError, match=r"got \(1, 16, 2, 4\), \(1, 5, 2, 2, 2\), \(1, 5, 2, 2, 2\)"):
        sampling(value, locations[..., 0], weights, sizes)
    with pytest.raises(InputError, match="are 2 levels of 13 tokens in all; the locations have 2 levels and value 16"):
        sampling(value, locations, weights, [(3, 3), (2, 2)])
    with pytest.raises(InputError, match="heads are 300 wide"):
        sampling(*inputs(sizes, 1, 5, 2, 300, 2), sizes, "triton")
    assert explain("ms_deform_attn", value, sizes, locations, weights).backend in ("torch", "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_it_matches_the_reference(dtype: torch.dtype) -> None:
    sizes = [(64, 48), (32, 24), (16, 12), (8, 6)]
    value, locations, weights = (t.cuda() for t in inputs(sizes, 2, 900, 8, 32, 4))
    call = partial(sampling, sizes=sizes)
    tensors = [value.to(dtype), locations, weights]
    assert_matches(partial(call, backend="triton"), partial(call, backend="reference"), tensors, scale=50)
