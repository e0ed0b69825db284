"""Packed attention: every backend against the reference in float64, over lengths, heads, masks and layouts."""

from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.backend import explain
from kernels.errors import InputError
from kernels.varlen_attention import varlen_attention
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
    queries: list[int],
    keys: list[int] | None = None,
    heads: int = 2,
    key_heads: int | None = None,
    width: int = 16,
    value_width: int | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    keys, key_heads = keys or queries, key_heads or heads
    q = torch.randn(sum(queries), heads, width)
    k, v = (torch.randn(sum(keys), key_heads, w) for w in (width, value_width or width))
    return [q, k, v], cuts(queries), cuts(keys)


def cuts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attention(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None, **options: object) -> object:
    return varlen_attention(q, k, v, key_bias=key_bias, **options)  # type: ignore[arg-type]


CASES = {
    "one": inputs([37]),
    "many with empty": inputs([5, 0, 12, 3, 0]),
    "cross": inputs([5, 12, 3, 4], [9, 0, 17, 1]),
    "grouped heads": inputs([20, 7], heads=4, key_heads=2),
    "odd widths": inputs([18, 9], heads=3, width=20, value_width=12),
    "wider values": inputs([10, 3], width=8, value_width=40),
    "single tokens": inputs([1, 1, 1], heads=1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_matches_the_reference(case: str, causal: bool, backend: str) -> None:
    tensors, cu_q, cu_k = CASES[case]
    call = partial(attention, cu_q=cu_q, cu_k=cu_k, causal=causal)
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [1, 2])
def test_a_bias_of_the_keys_hides_and_weighs_them(backend: str, heads: int) -> None:
    tensors, cu_q, cu_k = inputs([6, 20, 4], [6, 19, 3])
    bias = torch.randn(heads, 28)
    bias[:, [2, 9]] = -torch.inf
    bias[:, 25:] = -torch.inf  # the last segment sees nothing
    call = partial(attention, cu_q=cu_q, cu_k=cu_k)
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), [*tensors, bias])
    out, lse = call(*tensors, bias, backend=backend)
    assert (out[26:] == 0).all() and (lse[26:] == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_outside_the_tensors_is_not_read(backend: str) -> None:
    tensors, cu_q, cu_k = inputs([7, 5], [20, 3], width=12)
    call = partial(attention, cu_q=cu_q, cu_k=cu_k)
    spoiled = [poisoned(t) for t in tensors]
    assert_matches(partial(call, backend=backend), partial(call, backend="reference"), spoiled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_segment_is_blind_to_the_others(backend: str) -> None:
    (q, k, v), cu_q, cu_k = inputs([9, 30, 5])
    before = varlen_attention(q, k, v, cu_q, cu_k, backend=backend)[0]
    for t in (q, k, v):
        t[9:39] = torch.nan
    after = varlen_attention(q, k, v, cu_q, cu_k, backend=backend)[0]
    assert torch.equal(before[:9], after[:9]) and torch.equal(before[39:], after[39:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuted_segments_give_permuted_outputs(backend: str) -> None:
    (q, k, v), cu_q, cu_k = inputs([9, 6, 4])
    out = varlen_attention(q, k, v, cu_q, cu_k, backend=backend)[0]
    order = torch.cat([torch.arange(15, 19), torch.arange(9), torch.arange(9, 15)])
    moved = varlen_attention(q[order], k[order], v[order], cuts([4, 9, 6]), cuts([4, 9, 6]), backend=backend)[0]
    torch.testing.assert_close(moved, out[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_and_outliers_stay_finite(backend: str) -> None:
    (q, k, v), cu_q, cu_k = inputs([30])
    call = partial(attention, cu_q=cu_q, cu_k=cu_k)
    k[4] *= 1e4
    assert_matches(
        partial(call, backend=backend), partial(call, backend="reference"), [q, k, v], scale=30
    )  # scores of 1e4 hold three digits after the point in float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_segments_and_no_tokens(backend: str) -> None:
    empty = torch.zeros(0, 2, 16)
    for bounds in (cuts([]), cuts([0, 0])):
        out, lse = varlen_attention(empty, empty, empty, bounds, bounds, backend=backend)
        assert out.shape == (0, 2, 16) and lse.shape == (0, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_an_operator_to_the_compiler(backend: str) -> None:
    tensors, cu_q, cu_k = inputs([5, 0, 4], heads=2, key_heads=1)
    call = partial(attention, cu_q=cu_q, cu_k=cu_k, backend=backend)
    assert_compiles(call, tensors)
    assert_compiles(call, [*tensors, torch.randn(1, 9)])
    assert_any_incoming_gradient(call, tensors)


def test_it_is_registered_properly() -> None:
    (q, k, v), cu_q, cu_k = inputs([5, 0, 4])
    q.requires_grad_()
    bias = torch.randn(2, 9, requires_grad=True)
    assert_opcheck(torch.ops.fovea.varlen_attention.default, (q, k, v, cu_q, cu_k, None, True, 0.3, "torch"))
    assert_opcheck(torch.ops.fovea.varlen_attention.default, (q, k, v, cu_q, cu_k, bias, False, 0.3, "torch"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_numerical_gradients(backend: str) -> None:
    tensors, cu_q, cu_k = inputs([2, 0, 3], [3, 1, 2], heads=2, key_heads=1, width=3, value_width=2)
    call = partial(attention, cu_q=cu_q, cu_k=cu_k, backend=backend)
    assert_gradcheck(lambda *t: call(*t)[0], tensors)
    assert_gradcheck(lambda q, k, v: call(q, k, v)[0], [*tensors])
    (q, k, v), cu, _ = inputs([2, 3], width=3)
    assert_gradcheck(lambda *t: attention(*t, cu_q=cu, cu_k=cu, backend=backend), [q, k, v, torch.randn(1, 5)])


def test_autocast() -> None:
    tensors, cu_q, cu_k = inputs([20, 11])
    assert_runs_under_autocast(partial(attention, cu_q=cu_q, cu_k=cu_k), tensors, torch.bfloat16)


def test_the_choice_is_explained_and_never_silent() -> None:
    (q, k, v), cu_q, cu_k = inputs([4])
    assert explain("varlen_attention", q, k, v, cu_q, cu_k).backend == "torch"
    assert "asks for it" in str(explain(varlen_attention, q, k, v, cu_q, cu_k, backend="reference"))
    with pytest.raises(InputError, match="cannot serve because Triton serves float32, float16 and bfloat16"):
        varlen_attention(q.double(), k.double(), v.double(), cu_q, cu_k, backend="triton")
    wide = torch.zeros(4, 1, 300)
    with pytest.raises(InputError, match="300 wide"):
        varlen_attention(wide, wide, wide, cu_q, cu_k, backend="triton")
    with pytest.raises(InputError, match="Did you mean 'triton'"):
        varlen_attention(q, k, v, cu_q, cu_k, backend="tritn")
    with pytest.raises(InputError, match="not a multiple"):
        varlen_attention(torch.zeros(4, 3, 16), k, v, cu_q, cu_k)
    with pytest.raises(InputError, match="must both be"):
        varlen_attention(q, k, v, cu_q, cu_k[:1])


def test_half_precision_is_near_float64() -> None:
    tensors, cu_q, cu_k = inputs([40, 13])
    call = partial(attention, cu_q=cu_q, cu_k=cu_k)
    for dtype in (torch.float16, torch.bfloat16):
        half = [t.to(dtype) for t in tensors]
        assert_matches(partial(call, backend="torch"), partial(call, backend="reference"), half)
    assert_matches(partial(call, backend="triton"), partial(call, backend="reference"), [t.half() for t in tensors])
