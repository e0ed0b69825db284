"""Pooling with the embedding in it gives the reference's outputs and gradients, gated or not, whoever is hidden."""

import pytest
import torch
from torch import Tensor

from kernels.backend import INTERPRETING
from kernels.errors import InputError
from kernels.gated_attention_pool import MASKED
from kernels.gated_attention_pool.embedded import AttentionWeights, attention_pool, embedded_attention_pool

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETING, reason="tensors on the CPU"))
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


def outcomes(backend: str, x: Tensor, params: AttentionWeights, sizes: list[int], **options: object) -> list[Tensor]:
    pool = embedded_attention_pool(x, params, bounds(sizes), backend=backend, **options)  # type: ignore[arg-type]
    visible = pool.scores.masked_fill(pool.scores == MASKED, 0)
    objective = (pool.pooled.square().sum() + (pool.weights.square() * 3).sum()) + (visible * 0.01).sum()
    leaves = [x, *(p for p in params if p is not None)]
    return [*pool, *torch.autograd.grad(objective, leaves)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("hide", [None, hide_highest])
@pytest.mark.parametrize("bias", [True, False])
def test_the_fused_path_matches_the_reference(sizes: list[int], gated: bool, hide: object, bias: bool) -> None:
    dtype = torch.float64 if sum(sizes) < 100 else torch.float32
    params = parameters(gated, bias, dtype)
    x = torch.randn(sum(sizes), 5, dtype=dtype, requires_grad=True)
    fused, expected = (outcomes(backend, x, params, sizes, hide=hide) for backend in ("torch", "reference"))
    for ours, exact in zip(fused, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("backend", ["auto", "torch", TRITON])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("hide", [None, hide_highest])
def test_the_unfused_paths_match_the_reference(backend: str, activation: str, hide: object) -> None:
    sizes = [30, 0, 7]
    params = parameters(True, True, torch.float32)
    x = torch.randn(sum(sizes), 5, requires_grad=True)
    ours, expected = (outcomes(b, x, params, sizes, hide=hide, activation=activation) for b in (backend, "reference"))
    for got, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_every_instance_hidden_leaves_the_mean(backend: str) -> None:
    params = parameters(True, True, torch.float32)
    hidden = torch.randn(12, 6)
    pool = attention_pool(hidden, params, bounds([5, 7]), hide=lambda s: s < torch.inf, backend=backend)
    means = torch.stack([hidden[:5].mean(0), hidden[5:].mean(0)])
    torch.testing.assert_close(pool.pooled, means[:, None].expand(2, 3, 6))
    assert (pool.scores == MASKED).all()


@pytest.mark.parametrize("output", [0, 1, 2])
def test_each_output_alone_has_its_gradient(output: int) -> None:
    params = parameters(True, True, torch.float64)
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in params if p is not None)]

    def run(*leaves: Tensor) -> Tensor:
        params = AttentionWeights(*leaves[1:])
        return embedded_attention_pool(leaves[0], params, bounds([5, 0, 3]), backend="torch")[output]

    assert torch.autograd.gradcheck(run, leaves)


def test_features_without_gradient_cost_none() -> None:
    params = parameters(True, False, torch.float32)
    pool = embedded_attention_pool(torch.randn(40, 5), params, bounds([40]), backend="torch")
    pool.pooled.sum().backward()
    assert params.embed.grad is not None and params.embed.grad.abs().sum() > 0
    with torch.no_grad():
        again = embedded_attention_pool(torch.randn(40, 5), params, bounds([40]), backend="torch")
    assert not again.pooled.requires_grad


def test_half_precision_features_give_full_precision_results() -> None:
    params = parameters(True, True, torch.float32)
    x = torch.randn(3000, 5).half()
    for backend in ("torch", "reference"):
        pool = embedded_attention_pool(x, params, bounds([3000]), backend=backend)
        assert pool.pooled.dtype == torch.float32
        torch.testing.assert_close(pool.pooled, embedded_attention_pool(x.float(), params, bounds([3000])).pooled)


def test_dropout_on_embedding_and_gate_changes_the_result_and_keeps_gradients() -> None:
    params = parameters(True, True, torch.float32)
    x = torch.randn(300, 5)
    still = embedded_attention_pool(x, params, bounds([300]))
    dropped = embedded_attention_pool(x, params, bounds([300]), dropout=0.5)
    assert not torch.allclose(still.pooled, dropped.pooled)
    gate_dropped = attention_pool(torch.randn(300, 6), params, bounds([300]), gate_dropout=0.5)
    gate_dropped.scores.sum().backward()
    assert params.gate.grad is not None and params.gate.grad.abs().sum() > 0


def test_autocast_lowers_the_products_and_not_the_scores() -> None:
    params = parameters(True, True, torch.float32)
    x = torch.randn(300, 5)
    exact = embedded_attention_pool(x, params, bounds([300]))
    for backend in ("auto", "torch", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            pool = embedded_attention_pool(x, params, bounds([300]), backend=backend)
        assert pool.scores.dtype == torch.float32
        torch.testing.assert_close(pool.pooled.float(), exact.pooled, rtol=0.05, atol=0.05)


def test_backends_go_by_the_common_names() -> None:
    params = parameters(True, True, torch.float32)
    with pytest.raises(InputError, match="Known: auto, reference, torch, triton"):
        embedded_attention_pool(torch.randn(4, 5), params, bounds([4]), backend="cpu")


@pytest.mark.skipif(not INTERPRETING, reason="tensors on the CPU")
def test_dropout_within_the_gate_is_not_left_out_in_silence() -> None:
    params = parameters(True, True, torch.float32)
    with pytest.raises(InputError, match="dropout within the gate"):
        attention_pool(torch.randn(4, 6), params, bounds([4]), gate_dropout=0.5, backend="triton")
