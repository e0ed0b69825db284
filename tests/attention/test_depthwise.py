"""The depthwise convolution with a quick gradient against ``nn.Conv2d``."""

import pytest
import torch
from torch import nn

from attention.depthwise import DepthwiseConv2d, _Depthwise


@pytest.mark.parametrize("side", [1, 3, 5, 7])
@pytest.mark.parametrize("size", [(9, 6), (2, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_convolution(side: int, size: tuple[int, int], bias: bool) -> None:
    ours, plain = DepthwiseConv2d(4, side), nn.Conv2d(4, 4, side, padding=side // 2, groups=4)
    plain.load_state_dict(ours.state_dict())
    if not bias:
        ours.bias = plain.bias = None
    both = []
    for layer in (ours, plain):
        x = torch.randn(2, *size, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = layer(x[..., 8:].permute(0, 3, 1, 2))  # a view, as the values of a joint projection are
        both.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(both[0], both[1], rtol=1e-4, atol=1e-4)


def test_derivatives_of_any_order() -> None:
    layer = DepthwiseConv2d(2, 5).double()
    inputs = (torch.randn(1, 2, 4, 3, dtype=torch.double, requires_grad=True), layer.weight, layer.bias)
    assert torch.autograd.gradcheck(_Depthwise.apply, inputs)
    assert torch.autograd.gradgradcheck(_Depthwise.apply, inputs)


def test_frozen_weights_and_autocast() -> None:
    layer = DepthwiseConv2d(4, 5)
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    layer.requires_grad_(False)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert gradient.shape == x.shape and layer.weight.grad is not None
