"""The fused pooling gives the reference's outputs and gradients, gated or not, with and without hidden instances."""

import pytest
import torch
from torch import Tensor

from kernels.gated_attention import MASKED, AttentionWeights, gated_attention_pool

SIZES = [[9], [0], [3, 0, 1, 6], [0, 2, 0], [2500, 0, 1700, 1], [4096, 4097]]


def parameters(gated: bool, bias: bool, dtype: torch.dtype, rows: int = 3) -> AttentionWeights:
    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, dtype=dtype) / shape[-1] ** 0.5).requires_grad_()

    gate = 2 * 4 if gated else 4
    embed_bias = draw(6) if bias else None
    return AttentionWeights(draw(6, 5), embed_bias, draw(gate, 6), draw(gate), draw(rows, 4), draw(rows))


def bounds(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def hide_highest(scores: Tensor) -> Tensor:
    return scores > 0.3


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("hide", [None, hide_highest])
@pytest.mark.parametrize("bias", [True, False])
def test_the_fused_path_matches_the_reference(sizes: list[int], gated: bool, hide: object, bias: bool) -> None:
    dtype = torch.float64 if sum(sizes) < 100 else torch.float32
    params = parameters(gated, bias, dtype)
    x = torch.randn(sum(sizes), 5, dtype=dtype, requires_grad=True)
    leaves = [x, *(p for p in params if p is not None)]
    outcomes = []
    for backend in ("cpu", "torch"):
        pool = gated_attention_pool(x, params, bounds(sizes), hide=hide, backend=backend)  # type: ignore[arg-type]
        visible = pool.scores.masked_fill(pool.scores == MASKED, 0)
        objective = (pool.pooled.square().sum() + (pool.weights.square() * 3).sum()) + (visible * 0.01).sum()
        outcomes.append([*pool, *torch.autograd.grad(objective, leaves)])
    for ours, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("output", [0, 1, 2])
def test_each_output_alone_has_its_gradient(output: int) -> None:
    params = parameters(True, True, torch.float64)
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in params if p is not None)]

    def run(*leaves: Tensor) -> Tensor:
        return gated_attention_pool(leaves[0], AttentionWeights(*leaves[1:]), bounds([5, 0, 3]), backend="cpu")[output]

    assert torch.autograd.gradcheck(run, leaves)


def test_features_without_gradient_cost_none() -> None:
    params = parameters(True, False, torch.float32)
    pool = gated_attention_pool(torch.randn(40, 5), params, bounds([40]), backend="cpu")
    pool.pooled.sum().backward()
    assert params.embed.grad is not None and params.embed.grad.abs().sum() > 0
    with torch.no_grad():
        again = gated_attention_pool(torch.randn(40, 5), params, bounds([40]), backend="cpu")
    assert not again.pooled.requires_grad


def test_half_precision_features_give_full_precision_results() -> None:
    params = parameters(True, True, torch.float32)
    x = torch.randn(3000, 5).half()
    for backend in ("cpu", "torch"):
        pool = gated_attention_pool(x, params, bounds([3000]), backend=backend)  # type: ignore[arg-type]
        assert pool.pooled.dtype == torch.float32
        torch.testing.assert_close(pool.pooled, gated_attention_pool(x.float(), params, bounds([3000])).pooled)


def test_the_fused_path_says_what_it_cannot_do() -> None:
    params = parameters(True, True, torch.float32)
    with pytest.raises(ValueError, match=r"dropout=0\.5"):
        gated_attention_pool(torch.randn(4, 5), params, bounds([4]), dropout=0.5, backend="cpu")
