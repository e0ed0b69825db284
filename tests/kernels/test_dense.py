"""The CPU path of the linear layer gives the reference's numbers and gradients for every number of rows."""

import pytest
import torch
from torch import Tensor

from kernels import dense
from kernels.backend import INTERPRETING, using
from kernels.dense import linear, linear_reference, project, weight_gradient
from kernels.errors import InputError

ROWS = [0, 1, 15, 255, 256, 1023, 1039, 2048, 2049, 4100]


def layer(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = torch.randn(rows, 20), torch.randn(12, 20) / 4, torch.randn(12)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_cpu_path_matches_the_reference(rows: int, activation: dense.Activation, with_bias: bool) -> None:
    x, weight, bias = layer(rows)
    outcomes = []
    for call in (lambda *a: linear(*a, backend="torch"), linear_reference):
        leaves = [t.clone().requires_grad_() for t in ((x, weight, bias) if with_bias else (x, weight))]
        out = call(*leaves[:2], leaves[2] if with_bias else None, activation)
        (out * torch.linspace(-1, 1, max(out.numel(), 1))[: out.numel()].view_as(out)).sum().backward()
        outcomes.append([out, *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_gradients_match_finite_differences() -> None:
    x, weight, bias = (t.requires_grad_() for t in layer(7, torch.float64))
    assert torch.autograd.gradcheck(lambda *a: linear(*a, "relu", backend="torch"), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *a: linear(*a, backend="torch"), (x, weight))


@pytest.mark.parametrize("threads", [1, 2])
def test_products_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight, bias = layer(1500)
        grad = torch.randn(1500, 12)
        torch.testing.assert_close(project(x, weight, bias), x @ weight.t() + bias, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weight_gradient(grad, x), grad.t() @ x, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_computed_in_the_weights_precision(half: torch.dtype) -> None:
    x, weight, bias = layer(2100)
    for backend in ("torch", "reference"):
        out = linear(x.to(half), weight, bias, "relu", backend)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, linear_reference(x.to(half).float(), weight, bias, "relu"))


def test_gelu_and_autocast_take_the_reference() -> None:
    x, weight, bias = layer(2100)
    torch.testing.assert_close(linear(x, weight, bias, "gelu"), torch.nn.functional.gelu(x @ weight.t() + bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16


def test_the_default_takes_the_cpu_path_for_many_rows_only() -> None:
    x, weight, _ = layer(2100)
    assert dense.cpu_path_serves(x, weight)
    assert not dense.cpu_path_serves(x[:10], weight)
    assert not dense.cpu_path_serves(x.double(), weight.double())
    assert not dense.cpu_path_serves(x.t().contiguous().t(), weight)


def test_backends_go_by_the_common_names() -> None:
    x, weight, bias = layer(30)
    expected = linear_reference(x, weight, bias, "relu")
    for backend in ("auto", "torch", "reference"):
        torch.testing.assert_close(linear(x, weight, bias, "relu", backend), expected)
    with pytest.raises(InputError, match="Known: auto, reference, torch, triton"):
        linear(x, weight, bias, backend="cpu")
    with pytest.raises(InputError, match="backend 'triton' of the call cannot serve"):
        linear(x.double(), weight.double(), backend="triton")


@pytest.mark.skipif(not INTERPRETING, reason="tensors on the CPU")
def test_a_model_forced_to_triton_keeps_its_linear_layers() -> None:
    x, weight, bias = layer(30)
    expected = linear_reference(x, weight, bias, "relu")
    torch.testing.assert_close(linear(x, weight, bias, "relu", "triton"), expected)
    with using(backend="triton"):
        torch.testing.assert_close(linear(x, weight, bias, "relu"), expected)
