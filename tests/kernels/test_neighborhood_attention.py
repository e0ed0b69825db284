"""Neighbourhood attention: every backend against the reference in float64, over grids, windows, heads and layouts."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import explain
from kernels.errors import InputError
from kernels.neighborhood_attention import Fit, eager, fit_window, neighborhood_attention
from kernels.neighborhood_attention.tiles import intervals, looks, mask, tile_sizes
from kernels.windows import Axis, window, window_mask
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


def inputs(
    *grid: int, batch: int = 1, heads: int = 2, key_heads: int | None = None, width: int = 8, values: int | None = None
) -> list[Tensor]:
    """q, k, v."""
    key_heads = key_heads or heads
    q = torch.randn(batch, *grid, heads, width)
    k, v = (torch.randn(batch, *grid, key_heads, w) for w in (width, values or width))
    return [q, k, v]


def attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None = None, **options: object) -> tuple[Tensor, Tensor]:
    return neighborhood_attention(q, k, v, rpb=rpb, return_lse=True, **options)  # type: ignore[arg-type, call-overload]


def check(tensors: list[Tensor], backend: str, scale: float = 1.0, **options: object) -> None:
    assert_matches(
        partial(attention, backend=backend, **options),
        partial(attention, backend="reference", **options),
        tensors,
        scale,
    )


# name: grid, inputs, settings
CASES: dict[str, tuple[tuple[int, ...], dict[str, int], dict[str, object]]] = {
    "1-D": ((37,), {"batch": 2, "heads": 1}, {"kernel_size": 5}),
    "1-D dilated exact fit": ((12,), {}, {"kernel_size": 4, "dilation": 3}),
    "1-D one more than fits": ((13,), {"heads": 1}, {"kernel_size": 4, "dilation": 3, "stride": 3}),
    "1-D causal strided dilated": (
        (29,),
        {"heads": 1},
        {"kernel_size": 5, "stride": 2, "dilation": 3, "is_causal": True},
    ),
    "1-D two tokens": ((2,), {"heads": 1}, {"kernel_size": 2, "stride": 2}),
    "2-D prime": ((13, 7), {"heads": 1}, {"kernel_size": (5, 3)}),
    "2-D even kernel": ((9, 8), {"heads": 1}, {"kernel_size": (4, 6), "stride": (3, 1)}),
    "2-D blocks": ((8, 12), {"heads": 1}, {"kernel_size": 4, "stride": 4}),
    "2-D dilated": ((11, 7), {"heads": 1}, {"kernel_size": 3, "dilation": (2, 1)}),
    "2-D causal on one axis": (
        (8, 9),
        {"heads": 1},
        {"kernel_size": (4, 3), "stride": (2, 1), "is_causal": (True, False)},
    ),
    "2-D axis of two": ((2, 17), {"heads": 1}, {"kernel_size": (2, 5)}),
    "2-D grouped heads": ((7, 6), {"heads": 4, "key_heads": 2}, {"kernel_size": 3}),
    "2-D odd widths": ((6, 7), {"heads": 3, "width": 12, "values": 20}, {"kernel_size": 3}),
    "2-D wide keys": ((5, 6), {"heads": 1, "width": 24, "values": 5}, {"kernel_size": (3, 4)}),
    "3-D": ((4, 5, 6), {"heads": 1}, {"kernel_size": 3}),
    "3-D mixed": (
        (5, 4, 6),
        {"heads": 1},
        {"kernel_size": (2, 4, 3), "stride": (2, 3, 1), "dilation": (2, 1, 1), "is_causal": (True, False, False)},
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_it_matches_the_reference(case: str, backend: str) -> None:
    grid, shape, settings = CASES[case]
    check(inputs(*grid, **shape), backend, **settings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", ["1-D one more than fits", "2-D even kernel", "2-D causal on one axis", "2-D grouped heads", "3-D mixed"]
)
def test_a_bias_by_relative_position_has_a_gradient_in_every_setting(case: str, backend: str) -> None:
    grid, shape, settings = CASES[case]
    q, k, v = inputs(*grid, **shape)
    kernel = window(grid, settings["kernel_size"]).kernel  # type: ignore[arg-type]
    rpb = torch.randn(q.shape[-2], *(2 * size - 1 for size in kernel))
    check([q, k, v, rpb], backend, **settings)
    frozen = partial(attention, rpb=rpb, **settings)
    precise = partial(attention, rpb=rpb.double(), **settings)
    assert_matches(partial(frozen, backend=backend), partial(precise, backend="reference"), [q, k, v])


def test_the_bias_is_indexed_by_key_minus_query() -> None:
    q = torch.zeros(1, 9, 1, 4)
    v = torch.eye(9)[None, :, None]
    rpb = torch.tensor([[0.0, 0.0, 0.0, 0.0, 50.0]])  # two steps to the right
    for backend in ("torch", "reference"):
        out = neighborhood_attention(q, q, v, 3, rpb=rpb, backend=backend)
        assert out[0, 0, 0].argmax() == 2  # only the first query sees so far
        torch.testing.assert_close(out[0, 4, 0], torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 0]) / 3)


@pytest.mark.parametrize(("stride", "dilation", "causal"), list(itertools.product((1, 2), (1, 3), (False, True))))
def test_many_tiles_and_many_chunks(stride: int, dilation: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "CHUNK", 1 << 10)
    monkeypatch.setattr(eager, "KEPT_ROWS", 0)
    monkeypatch.setattr(eager, "tile_sizes", lambda *_: (4, 5))
    settings = {"kernel_size": (4, 5), "stride": stride, "dilation": (dilation, 1), "is_causal": (False, causal)}
    tensors = inputs(23, 19, batch=2, heads=4, key_heads=2)
    check(tensors, "torch", **settings)
    check([*tensors, torch.randn(4, 7, 9)], "torch", **settings)


@pytest.mark.parametrize(
    "axis", [Axis(25, 4, 3, 2), Axis(17, 5, 2, 3, True), Axis(9, 9), Axis(31, 6, 6), Axis(8, 2, 1, 4)]
)
@pytest.mark.parametrize("relative", [False, True])
def test_tiles_cover_every_pair_once(axis: Axis, relative: bool) -> None:
    for length in {axis.group_length(group) for group in range(axis.dilation)}:
        starts, ends = intervals(axis, length)
        for x in range(length):
            group = next(g for g in range(axis.dilation) if axis.group_length(g) == length)
            assert (starts[x], ends[x]) == axis.interval(x * axis.dilation + group)
    other = Axis(7, 3)
    frame = window((axis.length, 7), (axis.kernel, 3), (axis.stride, 1), (axis.dilation, 1), (axis.causal, False))
    assert frame.axes == (axis, other)
    for sizes in ((3, 2), (8, 7), tile_sizes(frame, 2, 64, relative)):
        pairs = torch.zeros(7 * axis.length, 7 * axis.length, dtype=torch.int64)
        for look in looks(frame, sizes, relative):
            seen = mask(look.parts)
            seen = torch.ones(look.queries.shape[1], look.keys.shape[1]) if seen is None else seen
            for queries, keys in zip(look.queries, look.keys, strict=True):
                pairs[queries[:, None], keys] += seen.long()
        assert torch.equal(pairs, window_mask(frame).long())


def test_an_axis_of_tens_of_thousands() -> None:
    q, k, v = inputs(32768, heads=1, width=4)
    out = neighborhood_attention(q, k, v, 33, dilation=5)
    for position in (0, 7, 16384, 32767):
        keys = list(Axis(32768, 33, 1, 5).keys(position))
        weights = (q[0, position, 0] @ k[0, keys, 0].T / 2).softmax(-1)
        torch.testing.assert_close(out[0, position, 0], weights @ v[0, keys, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dilation_is_attention_within_groups(backend: str) -> None:
    q, k, v = inputs(14, 5)
    out = neighborhood_attention(q, k, v, (3, 2), dilation=(3, 1), backend=backend)
    for group in range(3):
        part = neighborhood_attention(*(t[:, group::3] for t in (q, k, v)), (3, 2), backend=backend)
        torch.testing.assert_close(out[:, group::3], part, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_the_whole_grid_is_full_attention(backend: str) -> None:
    q, k, v = inputs(5, 6)
    out = neighborhood_attention(q, k, v, (5, 6), backend=backend)
    full = F.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)))
    torch.testing.assert_close(out.flatten(1, 2), full.transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stride_of_the_kernel_is_attention_in_blocks(backend: str) -> None:
    q, k, v = inputs(12)
    out = neighborhood_attention(q, k, v, 4, stride=4, backend=backend)
    blocks = F.scaled_dot_product_attention(*(t.view(3, 4, 2, 8).transpose(1, 2) for t in (q, k, v)))
    torch.testing.assert_close(out.view(3, 4, 2, 8), blocks.transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_causal_window_of_the_whole_sequence_is_causal_attention(backend: str) -> None:
    q, k, v = inputs(19)
    out = neighborhood_attention(q, k, v, 19, is_causal=True, backend=backend)
    full = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
    torch.testing.assert_close(out, full.transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_outside_the_window_do_not_matter(backend: str) -> None:
    q, k, v = inputs(40)
    call = partial(neighborhood_attention, kernel_size=5, dilation=2, backend=backend)
    before = call(q, k, v)
    for query in (0, 11, 39):
        hidden = sorted(set(range(40)) - set(Axis(40, 5, 1, 2).keys(query)))
        other_k, other_v = k.clone(), v.clone()
        other_k[:, hidden], other_v[:, hidden] = 1e4 * torch.randn(2, 1, len(hidden), 2, 8)
        assert torch.equal(call(q, other_k, other_v)[:, query], before[:, query])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_outside_the_tensors_is_not_read(backend: str) -> None:
    tensors = inputs(5, 9, heads=1, width=12)
    check([poisoned(t) for t in tensors], backend, kernel_size=3, dilation=(1, 2))
    check([poisoned(t, torch.inf) for t in tensors], backend, kernel_size=3, dilation=(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_is_taken(backend: str) -> None:
    fused = torch.randn(2, 4, 5, 3, 2, 8)
    check(list(fused.unbind(3)), backend, kernel_size=3)
    channels_first = torch.randn(3, 1, 16, 4, 5)
    check([t.unflatten(1, (2, 8)).movedim((1, 2), (-2, -1)) for t in channels_first], backend, kernel_size=3)
    turned = [t.transpose(1, 2) for t in inputs(6, 4, heads=1)]
    check(turned, backend, kernel_size=(3, 4))
    offset = [F.pad(t, (0, 0, 0, 0, 0, 0, 1, 0))[:, 1:] for t in inputs(6, 4, heads=1)]
    check(offset, backend, kernel_size=(3, 4))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_heads_may_come_first(backend: str) -> None:
    tensors = inputs(5, 6, batch=2, heads=2, key_heads=1, values=12)
    first = [t.movedim(-2, 1).contiguous() for t in tensors]
    out, lse = attention(*tensors, kernel_size=3, backend=backend)
    out_first, lse_first = attention(*first, kernel_size=3, backend=backend, heads_first=True)
    assert out_first.shape == (2, 2, 5, 6, 12) and lse_first.shape == (2, 2, 5, 6)
    torch.testing.assert_close(out_first.movedim(1, -2), out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse_first.movedim(1, -1), lse, rtol=1e-6, atol=1e-6)
    check(first, backend, kernel_size=3, heads_first=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_and_outliers_stay_finite(backend: str) -> None:
    q, k, v = inputs(7, 7)
    k[0, 3, 3] *= 1e4  # scores of 1e4 hold three digits after the point in float32
    check([q, k, v], backend, scale=30, kernel_size=3)
    k.fill_(0.5)
    check([q, k, v], backend, kernel_size=3)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_scale_of_zero_is_a_scale(backend: str) -> None:
    q, k, v = inputs(9, heads=1)
    out, lse = attention(q, k, v, kernel_size=9, scale=0.0, backend=backend)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, torch.full_like(lse, 9.0).log())


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_merge_by_their_log_sum_exp(backend: str) -> None:
    """Attention to a window and to further keys, merged, is attention to all of them; the gradient passes through."""
    q, k, v = inputs(11, heads=1)
    extra = torch.randn(2, 1, 3, 1, 8)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = attention(*leaves, kernel_size=11, backend=backend)
    scores = (q[:, :, 0] @ extra[0, :, :, 0].mT * 8**-0.5)[:, :, None]
    further = scores.logsumexp(-1)
    both = torch.logaddexp(lse, further)
    values = (scores.softmax(-1)[:, :, 0] @ extra[1, :, :, 0])[:, :, None]
    merged = (lse - both).exp()[..., None] * out + (further - both).exp()[..., None] * values
    whole = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, torch.cat([k, extra[0]], 1), torch.cat([v, extra[1]], 1)))
    ).transpose(1, 2)
    cotangent = torch.randn_like(merged)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)
    ours, exact = (torch.autograd.grad(t, leaves, cotangent) for t in (merged, whole))
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_bit_for_bit(backend: str) -> None:
    tensors = [t.requires_grad_() for t in (*inputs(6, 9, heads=1), torch.randn(1, 5, 5))]
    runs = []
    for _ in range(2):
        out, lse = attention(*tensors, kernel_size=3, backend=backend)
        runs.append([out, *torch.autograd.grad(out.square().sum() + lse.sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend: str) -> None:
    tensors = [t.requires_grad_() for t in inputs(5, 6, batch=0)]
    out, lse = attention(*tensors, kernel_size=3, backend=backend)
    assert out.shape == (0, 5, 6, 2, 8) and lse.shape == (0, 5, 6, 2)
    assert all(g.shape == t.shape for g, t in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True))


def test_many_images_and_heads() -> None:
    tensors = inputs(2, batch=33_000, heads=2, width=1)
    out = neighborhood_attention(*tensors, 2, backend="torch")
    expected = neighborhood_attention(*tensors, 2, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_an_operator_to_the_compiler(backend: str) -> None:
    tensors = inputs(4, 5, heads=2, key_heads=1)
    call = partial(attention, kernel_size=(3, 2), stride=(2, 1), backend=backend)
    assert_compiles(call, tensors)
    assert_compiles(call, [*tensors, torch.randn(2, 5, 3)])
    assert_any_incoming_gradient(call, tensors)
    first = [t.movedim(-2, 1) for t in tensors]
    assert_compiles(partial(call, heads_first=True), first)


def test_it_is_registered_properly() -> None:
    tensors = [t.requires_grad_() for t in inputs(4, 5)]
    operator = torch.ops.fovea.neighborhood_attention.default
    settings = ([3, 2], [2, 1], [1, 2], [False, True], 0.3, "torch")
    assert_opcheck(operator, (*tensors, None, *settings))
    assert_opcheck(operator, (*tensors, torch.randn(2, 5, 3, requires_grad=True), *settings))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_numerical_gradients(backend: str) -> None:
    tensors = inputs(4, 3, heads=2, key_heads=1, width=2, values=3)
    call = partial(attention, kernel_size=(2, 3), stride=(2, 1), dilation=(2, 1), backend=backend)
    assert_gradcheck(call, tensors)
    assert_gradcheck(lambda *t: call(*t)[0], [*tensors, torch.randn(2, 3, 5)])
    assert_gradcheck(lambda *t: attention(*t, kernel_size=2, backend=backend)[0], inputs(5, heads=1, width=2))


def test_only_the_bias_may_need_a_gradient() -> None:
    q, k, v = inputs(6, 7)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    grads = [
        torch.autograd.grad(neighborhood_attention(q, k, v, 3, rpb=rpb, backend=b).square().sum(), rpb)[0]
        for b in ("torch", "reference")
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_autocast() -> None:
    tensors = inputs(9, 8)
    assert_runs_under_autocast(partial(attention, kernel_size=3), tensors, torch.bfloat16)
    rpb = torch.randn(2, 5, 5)
    assert_runs_under_autocast(partial(attention, kernel_size=3), [*tensors, rpb], torch.bfloat16)


def test_half_precision_is_near_float64() -> None:
    tensors = [*inputs(17, 18, width=16), torch.randn(2, 9, 9)]
    for dtype in (torch.float16, torch.bfloat16):
        half = [t.to(dtype) for t in tensors]
        check(half, "torch", kernel_size=5)
        check(half[:3], "torch", kernel_size=5, dilation=2)
    small = [t.half() for t in inputs(6, 7, width=16)]
    check(small, "triton", kernel_size=3)
    check([*small, torch.randn(2, 5, 5).half()], "triton", kernel_size=3)


def test_no_integer_overflow() -> None:
    check([*inputs(5, 6), torch.randn(2, 5, 5)], "triton", kernel_size=3)


def test_the_choice_is_explained_and_never_silent() -> None:
    q, k, v = inputs(6, 7)
    assert explain("neighborhood_attention", q, k, v, 3).backend == "torch"
    assert "asks for it" in str(explain(neighborhood_attention, q, k, v, 3, backend="reference"))
    with pytest.raises(InputError, match="cannot serve because Triton serves float32, float16 and bfloat16"):
        neighborhood_attention(q.double(), k.double(), v.double(), 3, backend="triton")
    wide = torch.zeros(1, 4, 1, 300)
    with pytest.raises(InputError, match="300 wide"):
        neighborhood_attention(wide, wide, wide, 2, backend="triton")


def test_bad_input_is_told_in_a_sentence() -> None:
    q, k, v = inputs(6, 7)
    with pytest.raises(InputError, match="grid of one to three axes"):
        neighborhood_attention(q[0, 0], k[0, 0], v[0, 0], 3)
    with pytest.raises(InputError, match="share batch and grid"):
        neighborhood_attention(q, k[:, :5], v[:, :5], 3)
    with pytest.raises(InputError, match="not a multiple"):
        neighborhood_attention(torch.zeros(1, 6, 7, 3, 8), k, v, 3)
    with pytest.raises(InputError, match=r"kernel_size=4 times dilation=2 is 8, more than the 6 tokens on axis 0"):
        neighborhood_attention(q, k, v, 4, dilation=2)
    with pytest.raises(InputError, match="stride=4 on axis 1"):
        neighborhood_attention(q, k, v, 3, stride=(1, 4))
    with pytest.raises(InputError, match="kernel_size=1"):
        neighborhood_attention(q, k, v, 1)
    with pytest.raises(InputError, match=r"rpb must be .* \(2, 5, 5\)"):
        neighborhood_attention(q, k, v, 3, rpb=torch.zeros(2, 5, 4))


def test_a_window_is_fitted_to_a_small_map() -> None:
    assert fit_window((30, 40), 7, 4) == Fit((7, 7), (4, 4), (0, 0))
    assert fit_window((20, 40), 7, 4, "pad") == Fit((7, 7), (4, 4), (8, 0))
    assert fit_window((5, 40), 3, (4, 2), "clamp_dilation") == Fit((3, 3), (1, 2), (0, 0))
    assert fit_window((5, 40), 7, policy="clamp_kernel") == Fit((5, 7), (1, 1), (0, 0))
    with pytest.raises(InputError, match="does not fit a map of"):
        fit_window((20, 40), 7, 4)
    with pytest.raises(InputError, match="does not fit"):
        fit_window((5, 40), 7, 4, "clamp_dilation")
    with pytest.raises(InputError, match="Did you mean 'clamp_kernel'"):
        fit_window((5, 40), 7, policy="clamp_kernels")


GPU_CASES = {
    "1-D": ((1000,), {"heads": 3, "width": 40}, {"kernel_size": 33, "dilation": 2}),
    "1-D causal": ((2048,), {"width": 128}, {"kernel_size": 512, "stride": 8, "is_causal": True}),
    "2-D": ((56, 56), {"heads": 4, "width": 32}, {"kernel_size": 7}),
    "2-D dilated": ((57, 61), {"heads": 4, "key_heads": 2, "width": 64}, {"kernel_size": 7, "dilation": (3, 2)}),
    "2-D large window": ((64, 48), {"width": 64}, {"kernel_size": 21, "stride": 4}),
    "2-D wide": ((20, 24), {"width": 256}, {"kernel_size": 5}),
    "2-D values": ((20, 24), {"width": 24, "values": 80}, {"kernel_size": 6}),
    "3-D": ((12, 13, 14), {"width": 96}, {"kernel_size": (3, 4, 5), "stride": (1, 2, 1)}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", GPU_CASES)
def test_a_gpu_matches_the_reference(case: str, biased: bool, dtype: torch.dtype) -> None:
    grid, shape, settings = GPU_CASES[case]
    tensors = inputs(*grid, batch=2, **shape)
    if biased:
        kernel = window(grid, settings["kernel_size"]).kernel  # type: ignore[arg-type]
        tensors.append(torch.randn(tensors[0].shape[-2], *(2 * size - 1 for size in kernel)))
    check([t.to("cuda", dtype) for t in tensors], "triton", **settings)


@pytest.mark.gpu
def test_a_gpu_keeps_no_scores() -> None:
    tensors = [t.to("cuda", torch.bfloat16).requires_grad_() for t in inputs(128, 128, batch=4, heads=4, width=32)]
    out = neighborhood_attention(*tensors, 13, backend="triton")
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = neighborhood_attention(*tensors, 13, backend="triton")
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    # The output, its gradient, three gradients, and two numbers per query and head in float32.
    one = out.numel() * out.element_size()
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * (5 * one + 2 * 4 * out.numel() // 32)


@pytest.mark.gpu
def test_a_gpu_takes_more_programs_than_a_grid_axis_holds() -> None:
    tensors = [t.to("cuda") for t in inputs(2, batch=33_000, heads=2, width=16)]
    out = neighborhood_attention(*tensors, 2, backend="triton")
    torch.testing.assert_close(out, neighborhood_attention(*tensors, 2, backend="reference"), rtol=1e-5, atol=1e-5)
