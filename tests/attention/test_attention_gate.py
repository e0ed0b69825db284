"""Attention gates: signals of other sizes and widths, both merges, closed forms, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attention.attention_gate import AttentionGate
from kernels.errors import InputError
from tests.attention.contract import ORDINARY, make_gate
from tests.attention.contract import released as released_form

every_merge = pytest.mark.parametrize("merge", ["concatenation", "sum"])


def gate(**changes: object) -> AttentionGate:
    module = make_gate("attention_gate", **changes)
    assert isinstance(module, AttentionGate)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d):
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module


@every_merge
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("norm", [True, False])
def test_a_signal_projected_before_it_is_resized_is_the_same(merge: str, axes: int, norm: bool) -> None:
    module = gate(signal_dim=20, merge=merge, norm=norm)
    run = released_form(module, "gate")
    assert run is not None
    x, signal = torch.randn(2, 32, *ORDINARY[axes]), torch.randn(2, 20, *[2] * axes)
    torch.testing.assert_close(module(x, signal), run(x, signal), rtol=1e-4, atol=1e-5)


@every_merge
@pytest.mark.parametrize("resolution", ["map", "signal"])
def test_one_weight_between_zero_and_one_for_each_place(merge: str, resolution: str) -> None:
    module = gate(signal_dim=6, merge=merge, resolution=resolution)
    x, signal = torch.randn(2, 32, 7, 9), torch.randn(2, 6, 3, 4)
    out, weights = module(x, signal, return_attention=True)
    assert weights.shape == (2, 1, 7, 9) and weights.min() > 0 and weights.max() < 1
    torch.testing.assert_close(out, x * weights)


@every_merge
def test_weights_made_on_the_signals_grid_are_those_of_the_averaged_map(merge: str) -> None:
    coarse, fine = gate(merge=merge, resolution="signal"), gate(merge=merge)
    fine.load_state_dict(coarse.state_dict())
    x, signal = torch.randn(2, 32, 6, 8), torch.randn(2, 32, 3, 4)
    average = nn.functional.avg_pool2d(x, 2)
    _, expected = fine(average, signal, return_attention=True)
    _, weights = coarse(x, signal, return_attention=True)
    expected = nn.functional.interpolate(expected, (6, 8), mode="bilinear")
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_the_signal_decides_and_without_one_the_map_does() -> None:
    module = gate()
    x, signal = torch.randn(1, 32, 5, 6), torch.randn(1, 32, 5, 6)
    assert not torch.allclose(module(x, signal), module(x))
    torch.testing.assert_close(module(x, x), module(x))


def test_layers_of_zeros_halve_the_map() -> None:
    module = gate()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 32, 4, 5)
    torch.testing.assert_close(module(x), x / 2)


def test_training_normalises_map_and_signal_by_their_own_batch() -> None:
    module = gate(signal_dim=4).train()
    x, signal = torch.randn(3, 32, 6, 6), torch.randn(3, 4, 2, 2)
    before = module.signal_norm.running_mean.clone()
    module(x, signal)
    batch = module.signal_proj(signal.flatten(2)).mean((0, 2))
    torch.testing.assert_close(module.signal_norm.running_mean, 0.99 * before + 0.01 * batch)
    assert module.score_norm.num_batches_tracked == 1


def test_the_gradient_reaches_the_signal() -> None:
    signal = torch.randn(1, 8, 2, 2, requires_grad=True)
    gate(signal_dim=8)(torch.randn(1, 32, 5, 5), signal).square().sum().backward()
    assert signal.grad is not None and signal.grad.abs().min() > 0


def test_signals_that_do_not_fit_are_refused() -> None:
    module = gate(signal_dim=8)
    x = torch.randn(2, 32, 4, 5)
    with pytest.raises(InputError, match=r"signal must be \(2, 8, H, W\) .* got \(2, 9, 4, 5\)"):
        module(x, torch.randn(2, 9, 4, 5))
    with pytest.raises(InputError, match=r"got \(2, 8, 4\)"):
        module(x, torch.randn(2, 8, 4))
    with pytest.raises(InputError, match=r"got \(3, 8, 4, 5\)"):
        module(x, torch.randn(3, 8, 4, 5))
    with pytest.raises(InputError, match=r"32 channels and the gate was built for a signal of 8"):
        module(x)


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'sum'"):
        make_gate("attention_gate", merge="sun")
    with pytest.raises(InputError, match="Did you mean 'signal'"):
        make_gate("attention_gate", resolution="signals")
    with pytest.raises(InputError, match=r"hidden_dim=0 must be"):
        make_gate("attention_gate", hidden_dim=0)
    with pytest.raises(InputError, match=r"norm_eps=0 above 0"):
        make_gate("attention_gate", norm_eps=0)
