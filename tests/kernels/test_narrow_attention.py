"""Attention of narrow queries: every path is the formula, and none keeps the matrix where it is large."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import narrow_attention as module
from kernels.narrow_attention import narrow_attention


def _operands(*shape: int, narrow: int, wide: int, keys: int | None = None, dtype: torch.dtype) -> list[Tensor]:
    *batch, queries = shape
    sizes = ((queries, narrow), (keys or queries, narrow), (keys or queries, wide))
    return [torch.randn(*batch, *size, dtype=dtype, requires_grad=True) for size in sizes]


def _formula(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.softmax(scale * q @ k.mT, -1) @ v


@pytest.mark.parametrize("shape", [(1, 1, 9), (2, 1, 200), (1, 3, 131)])
@pytest.mark.parametrize(("narrow", "wide", "keys"), [(1, 5, None), (4, 32, None), (4, 7, 150), (6, 6, None)])
def test_output_and_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], narrow: int, wide: int, keys: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_ROWS", 16)
    monkeypatch.setattr(module, "BLOCK", 16)
    given = _operands(*shape, narrow=narrow, wide=wide, keys=keys, dtype=torch.float64)
    ours, wanted = narrow_attention(*given, scale=0.7), _formula(*given, scale=0.7)
    torch.testing.assert_close(ours, wanted)
    above = torch.randn_like(wanted)
    torch.testing.assert_close(torch.autograd.grad(ours, given, above), torch.autograd.grad(wanted, given, above))


def test_scores_beyond_the_exponential_stay_finite() -> None:
    q, k, v = _operands(1, 1, 100, narrow=2, wide=4, dtype=torch.float32)
    out = narrow_attention(q * 1e3, k * 1e3, v, scale=1.0)
    torch.testing.assert_close(out, _formula(q * 1e3, k * 1e3, v, 1.0), rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [q, k, v]))


@pytest.mark.parametrize("shape", [(1, 1, 0), (0, 1, 300), (0, 1, 2)])
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    given = _operands(*shape, narrow=2, wide=4, dtype=torch.float32)
    out = narrow_attention(*given, scale=1.0)
    assert out.shape == (*shape, 4)
    assert [g.shape for g in torch.autograd.grad(out.sum(), given)] == [t.shape for t in given]


def test_no_operator_gives_a_matrix_of_all_places() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            largest = max(largest, *(t.numel() for t in tree_leaves(found) if isinstance(t, Tensor)), 0)
            return found

    given = _operands(1, 1, 3000, narrow=2, wide=16, dtype=torch.float32)
    with Sizes():
        torch.autograd.grad(narrow_attention(*given, scale=1.0).sum(), given)
    assert largest <= module.BLOCK < 3000**2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype: torch.dtype) -> None:
    given = _operands(1, 1, 90, narrow=2, wide=16, dtype=dtype)
    out = narrow_attention(*given, scale=1.0)
    assert out.dtype == dtype
    wanted = _formula(*(t.float() for t in given), 1.0)
    torch.testing.assert_close(out.float(), wanted, rtol=5e-2, atol=5e-2)
