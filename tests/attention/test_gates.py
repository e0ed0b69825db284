"""What holds for every gate: sizes, isolation, precision, gradients, compilation, costs."""

from __future__ import annotations

import pytest
import torch

import attention
from kernels.errors import InputError
from tests.attention.contract import (
    DIM,
    close_enough,
    compiled_agrees,
    every,
    gradients_are_right,
    grids,
    make_gate,
    ordinary_grid,
    released,
)

every_gate = every("gate")


def small(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    gate = make_gate(name)
    torch.manual_seed(0)
    return gate, torch.randn(2, DIM, *ordinary_grid(gate))


@every_gate
def test_any_size_gives_a_finite_map_of_the_same_shape_and_gradients(name: str) -> None:
    gate = make_gate(name)
    for grid in grids(gate):
        x = torch.randn(2, DIM, *grid, requires_grad=True)
        out = gate(x)
        assert out.shape == x.shape, grid
        out.square().sum().backward()
        assert out.isfinite().all() and x.grad is not None and x.grad.isfinite().all(), grid


@every_gate
def test_it_computes_what_the_released_formulation_computes(name: str) -> None:
    gate, x = small(name)
    run = released(gate, "gate")
    assert run is not None, f"tests/attention/released/{name}.py is missing"
    torch.testing.assert_close(gate(x), run(x), rtol=1e-4, atol=1e-4)


@every_gate
def test_an_item_does_not_see_the_rest_of_its_batch(name: str) -> None:
    gate, x = small(name)
    other = x.clone()
    other[1] = torch.randn_like(x[1]) * 3
    torch.testing.assert_close(gate(other)[0], gate(x)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gate(x[:1])[0], gate(x)[0], rtol=1e-4, atol=1e-5)


@every_gate
def test_channels_last_memory_gives_the_same_numbers(name: str) -> None:
    gate, x = small(name)
    if x.dim() == 4:
        torch.testing.assert_close(gate(x.to(memory_format=torch.channels_last)), gate(x), rtol=1e-4, atol=1e-5)


@every_gate
def test_its_weights_are_returned_on_request(name: str) -> None:
    gate, x = small(name)
    out, weights = gate(x, return_attention=True)
    torch.testing.assert_close(out, gate(x))
    assert weights.isfinite().all() and weights.shape[0] == 2
    if weights.dim() == x.dim() and torch.broadcast_shapes(weights.shape, x.shape) == x.shape:
        torch.testing.assert_close(x * weights, out, rtol=1e-4, atol=1e-5)


@every_gate
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    gate, x = small(name)
    assert gradients_are_right(gate, x)


@every_gate
def test_every_parameter_learns(name: str) -> None:
    gate, x = small(name)
    gate.train()(x).square().sum().backward()
    idle = [n for n, p in gate.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle


@every_gate
def test_half_precision_gives_the_numbers_of_float32_or_is_refused(name: str) -> None:
    gate, x = small(name)
    if not gate.takes_half:
        with pytest.raises(InputError, match="does not work in bfloat16"):
            gate.to(torch.bfloat16)(x.bfloat16())
        return
    full = gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        close_enough(gate(x), full)
    low = gate.to(torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    close_enough(low, full)


@every_gate
def test_it_compiles_as_one_graph(name: str) -> None:
    compiled_agrees(*small(name))


@every_gate
def test_its_state_goes_into_another(name: str) -> None:
    gate, x = small(name)
    other = make_gate(name, seed=5)
    other.load_state_dict(gate.state_dict())
    torch.testing.assert_close(other(x), gate(x), rtol=0, atol=0)
    attention.load_official(other, gate.state_dict())


@every_gate
def test_costs_grow_with_the_batch_and_hold_at_least_the_input_and_output(name: str) -> None:
    gate = make_gate(name)
    grid = (16, 16) if 2 in gate.grids else (256,)
    assert gate.flops((4, *grid)) == pytest.approx(4 * gate.flops((1, *grid)), rel=1e-6)
    assert gate.min_bytes((2, *grid)) >= 2 * 2 * 256 * DIM * 4
    assert gate.min_bytes((2, *grid), torch.bfloat16) == gate.min_bytes((2, *grid)) / 2


@every_gate
def test_wrong_shapes_and_signals_are_refused(name: str) -> None:
    gate, x = small(name)
    with pytest.raises(InputError, match=rf"'{name}' takes .*got \(2, "):
        gate(x[:, :-1])
    if not gate.takes_signal:
        with pytest.raises(InputError, match="takes no signal"):
            gate(x, x)
