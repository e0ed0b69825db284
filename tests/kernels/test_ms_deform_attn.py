"""Deformable sampling: the definition against a loop over samples, every backend against the definition in float64."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from math import floor
from typing import Any

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

# The gradient of the values has two kernels; the second is taken when algorithms must be deterministic.
BACKENDS = ["torch", "triton", "triton, sorted"]
Shapes = list[tuple[int, int]]
PYRAMID: Shapes = [(5, 7), (3, 4), (1, 1)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, sort = request.param.partition(", ")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(bool(sort))
    yield name
    torch.use_deterministic_algorithms(before)


def inputs(
    shapes: Shapes = PYRAMID, queries: int = 6, batch: int = 2, heads: int = 2, width: int = 6, points: int = 3
) -> list[Tensor]:
    """Value, locations of which a third lie outside, weights."""
    value = torch.randn(batch, sum(a * b for a, b in shapes), heads, width)
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2) * 1.6 - 0.3
    return [value, locations, torch.randn(locations.shape[:-1])]


def attention(value: Tensor, locations: Tensor, weights: Tensor, shapes: Any = PYRAMID, **options: Any) -> Tensor:
    return ms_deform_attn(value, shapes, locations, weights, **options)


def check(backend: str, tensors: list[Tensor], shapes: Shapes, **options: Any) -> None:
    call = partial(attention, shapes=shapes, **options)
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), tensors)


def one_by_one(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Every pixel of every sample in turn."""
    batch, queries, heads, levels, points, _ = locations.shape
    out = value.new_zeros(batch, queries, heads, value.shape[3])
    for b, q, h, level, p in product(*map(range, (batch, queries, heads, levels, points))):
        rows, columns = shapes[level]
        start = sum(a * c for a, c in shapes[:level])
        x = locations[b, q, h, level, p, 0].item() * columns - 0.5
        y = locations[b, q, h, level, p, 1].item() * rows - 0.5
        for j, i in product((floor(y), floor(y) + 1), (floor(x), floor(x) + 1)):
            if 0 <= j < rows and 0 <= i < columns:
                share = (1 - abs(x - i)) * (1 - abs(y - j))
                out[b, q, h] += weights[b, q, h, level, p] * share * value[b, start + j * columns + i, h]
    return out.flatten(2)


@pytest.mark.parametrize("shapes", [PYRAMID, [(1, 9)], [(4, 4), (2, 2)]], ids=str)
def test_it_is_bilinear_sampling_with_zeros_outside(shapes: Shapes, backend: str) -> None:
    tensors = inputs(shapes, queries=3, batch=2, width=4, points=2)
    value, locations, weights = (t.double() for t in tensors)
    expected = one_by_one(value, shapes, locations, weights)
    torch.testing.assert_close(ms_deform_attn(value, shapes, locations, weights, backend="reference"), expected)
    out = attention(*tensors, shapes=shapes, backend=backend)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (PYRAMID, {}),
        ([(4, 4)], {"points": 1, "width": 8}),
        ([(1, 1)], {"width": 20}),
        ([(1, 9), (6, 1)], {"heads": 1, "width": 16}),
        ([(3, 3), (2, 5)], {"batch": 1, "heads": 3, "queries": 17, "width": 33}),
        ([(2, 2)] * 5, {"points": 5, "width": 2}),
    ],
    ids=str,
)
def test_it_matches_the_reference(shapes: Shapes, options: dict[str, int], backend: str) -> None:
    check(backend, inputs(shapes, **options), shapes)


def test_borders_follow_the_convention_of_grid_sample(backend: str) -> None:
    """On pixel centres, on the map's edge, and where the last trace of a pixel ends; all are exact in binary."""
    shapes = [(4, 8)]
    steps = torch.tensor([-0.25, -0.125, -0.0625, 0.0, 0.0625, 0.125, 0.25, 0.5, 0.9375, 1.0, 1.0625, 1.125, 3.0])
    locations = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).view(1, -1, 1, 1, 1, 2)
    value = torch.randn(1, 32, 1, 4)
    check(backend, [value, locations, torch.randn(locations.shape[:-1])], shapes)


def test_far_outside_there_is_nothing(backend: str) -> None:
    value, locations, weights = inputs()
    far = torch.where(locations > 0.5, 1e30, -1e30)
    leaves = [value.requires_grad_(), far.requires_grad_(), weights.requires_grad_()]
    out = attention(*leaves, backend=backend)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


def test_many_samples_of_one_pixel_add_up(backend: str) -> None:
    value, locations, weights = inputs([(3, 3)], queries=25)
    locations[:] = 0.5 + 0.01 * torch.rand(locations.shape)
    check(backend, [value, locations, weights], [(3, 3)])


def test_nothing_to_do(backend: str) -> None:
    check(backend, inputs(queries=0), PYRAMID)
    check(backend, inputs(points=0), PYRAMID)
    check(backend, inputs(batch=0), PYRAMID)
    assert attention(*inputs(queries=0), backend=backend).shape == (2, 0, 12)


def test_levels_may_lie_anywhere(backend: str) -> None:
    value, locations, weights = inputs([(4, 3), (2, 5)], width=8)
    spread = torch.full((2, 40, 2, 8), torch.nan)
    spread[:, 25:37], spread[:, 3:13] = value[:, :12], value[:, 12:]
    options = {"level_start_index": [25, 3]}
    moved = attention(spread, locations, weights, shapes=[(4, 3), (2, 5)], backend=backend, **options)
    plain = attention(value, locations, weights, shapes=[(4, 3), (2, 5)], backend=backend)
    assert torch.equal(moved, plain)
    whole = torch.randn(2, 15, 2, 8)
    check(backend, [whole, locations, weights], [(4, 3), (2, 5)], level_start_index=[1, 4])  # they overlap


def test_sizes_may_be_tensors(backend: str) -> None:
    tensors = inputs()
    starts = torch.tensor([0, 35, 47])
    out = attention(*tensors, shapes=torch.tensor(PYRAMID), level_start_index=starts, backend=backend)
    assert torch.equal(out, attention(*tensors, backend=backend))


def test_what_is_off_the_map_is_not_read(backend: str) -> None:
    """Rows that no sample touches may hold anything, and so may what surrounds the tensors."""
    value, locations, weights = inputs([(4, 4), (3, 3)], width=8)
    for bad in (torch.nan, torch.inf):
        check(backend, [poisoned(t, bad) for t in (value, locations, weights)], [(4, 4), (3, 3)])
    locations[..., 0, :, 0].clamp_(max=0.3)  # between the first two columns of four
    clean = attention(value, locations, weights, shapes=[(4, 4), (3, 3)], backend=backend)
    spoiled = value.clone()
    spoiled[:, :16].view(2, 4, 4, 2, 8)[:, :, 2:] = torch.nan
    assert torch.equal(attention(spoiled, locations, weights, shapes=[(4, 4), (3, 3)], backend=backend), clean)


def test_a_batch_item_and_a_head_are_blind_to_the_others(backend: str) -> None:
    value, locations, weights = inputs()
    before = attention(value, locations, weights, backend=backend).unflatten(2, (2, -1))
    value[0], value[:, :, 1] = torch.nan, torch.nan
    after = attention(value, locations, weights, backend=backend).unflatten(2, (2, -1))
    assert torch.equal(after[1, :, 0], before[1, :, 0])


def test_any_layout(backend: str) -> None:
    _, locations, weights = inputs()
    heads_first = torch.randn(2, 2, 48, 6).transpose(1, 2)
    channels_first = torch.randn(2, 2, 6, 48).permute(0, 3, 1, 2)
    flipped = locations.flip(-1).transpose(1, 2).contiguous().transpose(1, 2)
    transposed = weights.mT.contiguous().mT
    check(backend, [heads_first, flipped, transposed], PYRAMID)
    check(backend, [channels_first, flipped, transposed], PYRAMID)


def test_a_change_of_order_of_the_queries_is_one_of_the_output(backend: str) -> None:
    value, locations, weights = inputs(queries=11)
    order = torch.randperm(11)
    moved = attention(value, locations[:, order], weights[:, order], backend=backend)
    assert torch.equal(moved, attention(value, locations, weights, backend=backend)[:, order])


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_two_runs_are_equal_bit_for_bit(name: str) -> None:
    leaves = [t.requires_grad_() for t in inputs(queries=9)]
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            out = attention(*leaves, backend=name)
            runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_queries_are_handled_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.ms_deform_attn import eager

    monkeypatch.setitem(eager._CHUNK, "cpu", 40)
    monkeypatch.setitem(eager._GATHERED, "cpu", 300)
    check("torch", inputs(queries=13), PYRAMID)


def test_it_is_an_operator_to_the_compiler(backend: str) -> None:
    call = partial(attention, shapes=[(3, 4), (2, 2)], backend=backend)
    assert_compiles(call, inputs([(3, 4), (2, 2)]))
    assert_any_incoming_gradient(call, inputs([(3, 4), (2, 2)]))


def test_it_is_registered_properly() -> None:
    tensors = [t.requires_grad_() for t in inputs([(3, 4), (2, 2)])]
    operator = torch.ops.fovea.ms_deform_attn.default
    assert_opcheck(operator, (*tensors, [3, 4, 2, 2], [0, 12], "torch"))


@pytest.mark.parametrize("backend_name", ["torch", "reference"])
def test_numerical_gradients(backend_name: str) -> None:
    shapes = [(3, 4), (1, 2)]
    value, locations, weights = inputs(shapes, queries=2, heads=2, width=2, points=2)
    # Away from the lines between cells, where there is no derivative.
    sizes = torch.tensor([[4.0, 3.0], [2.0, 1.0]])[:, None]
    at = locations * sizes - 0.5
    locations = (at.floor() + 0.2 + 0.6 * torch.rand(at.shape) + 0.5) / sizes
    assert_gradcheck(partial(attention, shapes=shapes, backend=backend_name), [value, locations, weights])


def test_autocast() -> None:
    value, locations, weights = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(value, locations, weights).dtype == torch.bfloat16
    assert_runs_under_autocast(attention, [value, locations, weights], torch.bfloat16)


def test_half_precision_is_near_float64(backend: str) -> None:
    value, locations, weights = inputs(queries=20, width=8)
    for dtype in (torch.float16, torch.bfloat16) if backend == "torch" else (torch.float16,):
        check(backend, [value.to(dtype), locations, weights], PYRAMID)
    check(backend, [t.half() for t in (value, locations, weights)], PYRAMID)


def test_the_choice_is_explained_and_never_silent() -> None:
    value, locations, weights = inputs()
    assert explain("ms_deform_attn", value, PYRAMID, locations, weights).backend == "torch"
    assert "asks for it" in str(explain(ms_deform_attn, value, PYRAMID, locations, weights, backend="reference"))
    with pytest.raises(InputError, match="cannot serve because Triton serves float32"):
        attention(value.double(), locations, weights, backend="triton")
    with pytest.raises(InputError, match="300 wide and the kernels take up to 256"):
        attention(*inputs(width=300), backend="triton")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"value": torch.zeros(2, 48, 12)}, r"takes value \(B, S, H, D\)"),
        ({"attention_weights": torch.zeros(2, 6, 2, 3, 2)}, r"attention_weights \(B, Q, H, L, P\); got"),
        ({"value": torch.zeros(2, 48, 3, 6)}, r"do not fit value \(2, 48, 3, 6\) with 3 levels"),
        ({"spatial_shapes": PYRAMID[:2]}, "with 2 levels"),
        ({"value": torch.zeros(2, 47, 2, 6)}, "reach beyond the 47 positions"),
        ({"level_start_index": [0, 35]}, "one .height, width. and start a level"),
        ({"level_start_index": [0, -1, 47]}, "reach beyond"),
        ({"spatial_shapes": [(5, 7), (3, 4), (0, 1)]}, "are not one"),
        ({"spatial_shapes": [(5, 7), (3, 4), (1, 1, 1)]}, "must be one"),
    ],
    ids=[
        "flat value",
        "other points",
        "other heads",
        "a level fewer",
        "too short",
        "starts fewer",
        "start below 0",
        "empty level",
        "three sides",
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], sentence: str) -> None:
    value, locations, weights = inputs()
    given = {
        "value": value,
        "spatial_shapes": PYRAMID,
        "sampling_locations": locations,
        "attention_weights": weights,
        **change,
    }
    with pytest.raises(InputError, match=sentence):
        ms_deform_attn(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [20, 32, 64])
def test_on_a_gpu(width: int, dtype: torch.dtype, sort: bool) -> None:
    shapes = [(64, 80), (32, 40), (16, 20), (1, 1)]
    value, locations, weights = (t.cuda() for t in inputs(shapes, queries=1500, heads=8, width=width, points=4))
    tensors = [value.to(dtype), locations, weights]
    torch.use_deterministic_algorithms(sort)
    try:
        # A few of 1.5 million samples lie so near a line between cells that float32 puts them on its other side.
        at = locations * torch.tensor([[b, a] for a, b in shapes], device="cuda")[:, None] - 0.5
        locations.add_(torch.where((at - at.round()).abs() < 1e-3, 1e-4, 0.0))
        check("triton", tensors, shapes)
    finally:
        torch.use_deterministic_algorithms(False)
