"""Gaussian adaptive attention: sums of weights, parts, single entries, masks, the block."""

from typing import Any

import pytest
import torch

import attention
from attention.gaussian_adaptive import GaussianBlock, GaussianHeads
from kernels.errors import InputError
from tests.attention.contract import compiled_agrees, gradients_are_right, make_gate, make_mixer
from tests.attention.released.gaussian_adaptive import released_gate, released_mixer


def heads(num_heads: int, offset: float = 0.0, **options: Any) -> GaussianHeads:
    torch.manual_seed(0)
    made = GaussianHeads(num_heads, **options)
    with torch.no_grad():
        made.mean_offsets.add_(offset)
    return made


def test_the_weights_of_each_part_sum_to_one() -> None:
    weights = heads(3)(torch.randn(2, 11, 4))
    for part in (slice(0, 3), slice(3, 6), slice(6, 11)):  # the last takes the remainder
        torch.testing.assert_close(weights[:, part].sum(1), torch.ones(2, 4))


@pytest.mark.parametrize("offset", [0.0, 1.5])
def test_the_weight_is_largest_next_to_the_mean_plus_offset(offset: float) -> None:
    x = torch.randn(1, 60, 3)
    weights = heads(1, offset)(x)
    nearest = (x - x.mean(1, keepdim=True) - offset).abs().argmin(1)
    assert torch.equal(weights.argmax(1), nearest)


def test_the_scale_and_place_of_the_input_do_not_matter_without_offsets() -> None:
    x = torch.randn(2, 20, 5)
    torch.testing.assert_close(heads(2)(3 * x - 7), heads(2)(x), rtol=1e-3, atol=1e-5)


def test_weights_vanish_where_all_densities_are_below_the_clamp() -> None:
    module = heads(1, 50.0)  # fifty deviations from every entry
    x = torch.randn(1, 9, 2, requires_grad=True)
    weights = module(x)
    weights.sum().backward()
    assert weights.abs().max() < 1e-20
    assert all(t is not None and t.isfinite().all() for t in (x.grad, module.c.grad, module.mean_offsets.grad))


def test_a_constant_axis_stays_finite_and_one_entry_has_weight_one() -> None:
    for offset in (0.0, 0.3):
        x = torch.full((1, 6, 2), 4.0, requires_grad=True)
        weights = heads(2, offset)(x)
        weights.sum().backward()
        assert weights.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
        torch.testing.assert_close(heads(4, offset)(torch.randn(1, 1, 2)), torch.ones(1, 1, 2))
        torch.testing.assert_close(heads(4, offset)(torch.randn(1, 3, 2)), torch.ones(1, 3, 2))


@pytest.mark.parametrize("axis", ["tokens", "channels"])
def test_both_axes_are_those_of_the_released_code(axis: str) -> None:
    mixer = make_mixer("gaussian_adaptive", axis=axis, num_gaussians=2)
    x = torch.randn(2, 3, 7, 32)
    torch.testing.assert_close(mixer(x), released_mixer(mixer)(x), rtol=1e-4, atol=1e-5)
    assert gradients_are_right(mixer, x)
    compiled_agrees(mixer.float(), x)


def test_a_gate_takes_channels_that_its_heads_do_not_divide() -> None:
    gate = make_gate("gaussian_adaptive", dim=19, num_heads=4)
    x = torch.randn(2, 19, 3, 4)
    torch.testing.assert_close(gate(x), released_gate(gate)(x), rtol=1e-4, atol=1e-5)


def test_channels_of_a_gate_and_of_a_mixer_are_the_same() -> None:
    gate = make_gate("gaussian_adaptive")
    mixer = make_mixer("gaussian_adaptive", axis="channels")
    mixer.load_state_dict(gate.state_dict())
    x = torch.randn(2, 32, 4, 5)
    torch.testing.assert_close(mixer(x.movedim(1, -1)).movedim(-1, 1), gate(x), rtol=1e-4, atol=1e-6)


def test_parts_and_statistics_are_those_of_real_tokens_wherever_they_lie() -> None:
    mixer = make_mixer("gaussian_adaptive")
    x, mask = torch.randn(1, 25, 32), torch.rand(1, 25) < 0.6
    torch.testing.assert_close(mixer(x, mask)[mask][None], mixer(x[mask][None]), rtol=1e-4, atol=1e-5)


def test_the_block_adds_each_layer_and_leaves_masked_tokens_out() -> None:
    torch.manual_seed(0)
    block = GaussianBlock(["tokens", "channels"], [2, 3], [2, 4])
    x = torch.randn(2, 9, 8)
    first = x * block.layers[0](x) + x
    second = first * block.layers[1](first.mT).mT + first
    torch.testing.assert_close(block(x), second)
    longer, mask = torch.cat([x, torch.full((2, 3, 8), torch.nan)], 1), torch.arange(12).expand(2, 12) < 9
    out = block(longer, mask)
    torch.testing.assert_close(out[:, :9], second)
    assert (out[:, 9:] == 0).all()


def test_bad_values_are_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'channels'"):
        attention.create("gaussian_adaptive", dim=8, num_heads=2, axis="channel")
    with pytest.raises(InputError, match="num_gaussians=0 must be at least 1"):
        attention.create("gaussian_adaptive", dim=8, num_heads=2, num_gaussians=0)
    with pytest.raises(InputError, match="num_heads=9 is more than the 8 channels"):
        attention.create("gaussian_adaptive", kind="gate", dim=8, num_heads=9)
    with pytest.raises(InputError, match="for each layer; got 2, 1 and 2"):
        GaussianBlock(["tokens", "tokens"], [2], [3, 3])
