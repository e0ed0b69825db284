"""Dense attention with its log-sum-exp: fused and plain forms agree with the definition, forward and backward."""

import pytest
import torch
from torch import Tensor

from kernels.softmax_attention import attend, attend_backward


def definition(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    repeats = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeats, 1).mT * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    lse = scores.masked_fill(blind, 0).logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)
    return [weights @ v.repeat_interleave(repeats, 1), lse]


@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 2, 5, 7, 8, 8), (1, 3, 3, 6, 4, 5, 9), (1, 2, 1, 3, 3, 9, 4)], ids=str)
@pytest.mark.parametrize("with_lse", [False, True])
def test_both_forms_are_the_definition(
    shape: tuple[int, ...], biased: bool, masked: bool, fused: bool | None, with_lse: bool
) -> None:
    b, h, g, m, n, d, e = shape
    q, k, v = (torch.randn(*s, dtype=torch.float64) for s in ((b, h, m, d), (b, g, n, d), (b, g, n, e)))
    bias = torch.randn(1, h, m, n, dtype=torch.float64) if biased else None
    mask = torch.rand(b, 1, m, n) > 0.4 if masked else None
    if mask is not None:
        mask[:, :, 1] = False
    leaves = [t.clone().requires_grad_() for t in (q, k, v, *([bias] if biased else []))]
    expected = definition(*leaves[:3], 0.4, mask, leaves[3] if biased else None)
    grads = [torch.randn_like(expected[0]), torch.randn_like(expected[1]) if with_lse else None]
    total = (expected[0] * grads[0]).sum()
    if with_lse:
        grads[1] = grads[1].masked_fill(expected[1].isinf(), 0)  # type: ignore[union-attr]
        total = total + (expected[1].masked_fill(expected[1].isinf(), 0) * grads[1]).sum()
    wanted = torch.autograd.grad(total, leaves)
    out, lse = attend(q, k, v, 0.4, mask, bias, fused)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])
    for of_bias in {False, biased}:
        got = attend_backward(grads[0], grads[1], q, k, v, out, lse, 0.4, mask, bias, of_bias, fused)  # type: ignore[arg-type]
        for ours, exact in zip(got[: 4 if of_bias else 3], wanted, strict=False):
            torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("empty", ["queries", "keys", "batch"])
def test_nothing_to_attend(empty: str) -> None:
    b, m, n = (0 if empty == "batch" else 2), (0 if empty == "queries" else 3), (0 if empty == "keys" else 4)
    q, k, v = torch.randn(b, 1, m, 8), torch.randn(b, 1, n, 8), torch.randn(b, 1, n, 8)
    out, lse = attend(q, k, v, 1.0)
    assert out.shape == (b, 1, m, 8) and (out == 0).all() and (lse == -torch.inf).all()
    grads = attend_backward(torch.ones_like(out), None, q, k, v, out, lse, 1.0)
    assert all((g == 0).all() for g in grads if g is not None)


def test_half_precision_keeps_scores_in_float32() -> None:
    q, k, v = (torch.randn(1, 2, 300, 16, dtype=torch.bfloat16) for _ in range(3))
    exact, exact_lse = definition(*(t.double() for t in (q, k, v)), 0.25, None, None)
    for fused in (True, False):
        out, lse = attend(q, k, v, 0.25, fused=fused)
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-2)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-4)
