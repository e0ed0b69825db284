"""Mixture-of-head attention: gates, loss, bias at any resolution, and the aggregated form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attention
from attention.continuous_bias import relative_coordinates, spread_bias
from attention.moh import MixtureOfHeadAttention
from kernels.errors import InputError
from tests.attention.contract import compiled_agrees, gradients_are_right


def make(**params: Any) -> MixtureOfHeadAttention:
    torch.manual_seed(0)
    module = attention.create("moh", **{"dim": 32, "num_heads": 8, "input_size": (6, 6), **params})
    assert isinstance(module, MixtureOfHeadAttention)
    return module.eval()


def test_gates_share_out_as_much_as_there_are_heads_on() -> None:
    module = make(shared_heads=2, routed_heads=3)
    x = torch.randn(2, 4, 5, 32)
    gates = module.gates(x)
    assert gates.shape == (2, 4, 5, 8) and ((gates[..., 2:] > 0).sum(-1) == 3).all() and (gates[..., :2] > 0).all()
    shares = 2 * module.wg_0(x).softmax(-1)
    torch.testing.assert_close(gates[..., :2].sum(-1), 2 * shares[..., 0])
    torch.testing.assert_close(gates[..., 2:].sum(-1), 3 * shares[..., 1])
    best = module.wg(x).topk(3, -1).indices.sort(-1).values
    torch.testing.assert_close(gates[..., 2:].topk(3, -1).indices.sort(-1).values, best)


@pytest.mark.parametrize(("shared", "routed"), [(8, 0), (0, 3), (1, 7)])
def test_all_heads_may_be_shared_and_none(shared: int, routed: int) -> None:
    module = make(shared_heads=shared, routed_heads=routed)
    gates = module.gates(torch.randn(1, 3, 3, 32))
    assert ((gates > 0).sum(-1) == shared + routed).all()
    if not shared or not routed:
        torch.testing.assert_close(gates.sum(-1), torch.full((1, 3, 3), float(shared + routed)))


def test_three_quarters_of_the_heads_are_on_by_default() -> None:
    for heads, shared, routed in [(1, 1, 0), (2, 1, 1), (4, 1, 2), (16, 4, 8)]:
        module = make(num_heads=heads)
        assert (module.shared_heads, module.routed_heads) == (shared, routed)
        assert module(torch.randn(1, 2, 2, 32)).isfinite().all()


def test_the_loss_is_smallest_for_equal_use_and_counts_real_tokens_alone() -> None:
    module, x = make(shared_heads=2, routed_heads=3), torch.randn(2, 4, 4, 32)
    extras: dict[str, torch.Tensor] = {}
    module(x, extras=extras)
    scores = module.wg(x).softmax(-1).flatten(0, 2)
    on = torch.zeros_like(scores).scatter(1, scores.topk(3).indices, 1)
    torch.testing.assert_close(extras["load_balance"], (scores.mean(0) * on.mean(0)).mean() * 36)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[:, 2:] = False
    masked: dict[str, torch.Tensor] = {}
    module(x, mask, extras=masked)
    module(x[:, :2], extras=extras)
    torch.testing.assert_close(masked["load_balance"], extras["load_balance"])
    module(x, torch.zeros_like(mask), extras=masked)
    assert masked["load_balance"] == 0
    shared_alone: dict[str, torch.Tensor] = {}
    make(shared_heads=8, routed_heads=0)(x, extras=shared_alone)
    assert not shared_alone


@pytest.mark.parametrize(("size", "keys"), [((4, 6), (4, 6)), ((6, 8), (3, 4)), ((7, 5), (3, 2)), ((5,), (2,))])
def test_biases_are_those_of_each_pairs_offset(size: tuple[int, ...], keys: tuple[int, ...]) -> None:
    table, offsets, indices = relative_coordinates(size, keys, size)
    assert len(table) == math.prod(offsets)
    found = spread_bias(table, offsets, indices)
    axes = []
    for n, m in zip(size, keys, strict=True):
        places = torch.arange(n).float()
        centres = torch.nn.functional.adaptive_avg_pool1d(places[None], m)[0]
        axes.append((places[:, None] - centres) / max(n - 1, 1) * 8)
    for axis, offset in enumerate(axes):
        shape = [1] * (2 * len(size))
        shape[axis], shape[len(size) + axis] = offset.shape
        value = (offset.sign() * (offset.abs() + 1).log2() / 3).reshape(shape)
        torch.testing.assert_close(found[axis], value.expand(*size, *keys).reshape(math.prod(size), -1))


def test_a_learned_bias_reaches_other_resolutions() -> None:
    module = make()
    small, large = module.bias((6, 6), (6, 6)), module.bias((8, 8), (8, 8))
    # The same offset has the same bias wherever it is.
    torch.testing.assert_close(small[:, 0, 7], large[:, 0, 9])
    torch.testing.assert_close(small[:, 7, 0], large[:, 9, 0])


def test_scores_grow_with_the_logarithm_of_the_real_keys() -> None:
    module = make(num_heads=1, dim=4)
    with torch.no_grad():
        module.cpb_fc2.weight.zero_()
    x = torch.randn(1, 4, 4, 4)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, 1:3, 1:3] = True
    _, alone = module(x[:, 1:3, 1:3], return_attention=True)
    _, masked = module(x, mask, return_attention=True)
    inside = mask.flatten(1)[0].nonzero()[:, 0]
    torch.testing.assert_close(masked[0, 0][inside][:, inside], alone[0, 0])


@pytest.mark.parametrize("axes", [1, 3])
def test_sequences_and_volumes_have_as_many_coordinates_as_axes(axes: int) -> None:
    grid = (7, 2, 3)[:axes]
    module = make(input_size=grid)
    assert module.cpb_fc1.in_features == axes
    x = torch.randn(2, *grid, 32)
    out, weights = module(x, return_attention=True)
    assert out.shape == x.shape and weights.shape == (2, 8, math.prod(grid), math.prod(grid))
    with pytest.raises(InputError, match="'moh' takes"):
        module(torch.randn(2, 4, 4, 32))


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (9, 5), (8, 8)])
def test_the_aggregated_form_takes_any_size_and_mask(grid: tuple[int, int]) -> None:
    module = make(form="aggregated", sr_ratio=4)
    x = torch.randn(2, *grid, 32)
    mask = torch.rand(2, *grid) < 0.6
    mask[0, 0, 0], mask[1] = True, False
    x.requires_grad_()
    clean = module(x, mask)
    clean.square().sum().backward()
    assert (clean[1] == 0).all() and x.grad is not None and x.grad.isfinite().all()
    torch.testing.assert_close(module(x.masked_fill(~mask[..., None], torch.nan), mask), clean)
    torch.testing.assert_close(module(x, torch.ones_like(mask)), module(x))
    with pytest.raises(InputError, match="no weights between tokens"):
        module(x, return_attention=True)


def test_the_aggregated_form_has_right_gradients_compiles_and_takes_half_precision() -> None:
    module = make(form="aggregated", sr_ratio=2, dim=16, num_heads=4, shared_heads=4, routed_heads=0)
    with torch.no_grad():
        module.learnable_bias.normal_()
    x = torch.randn(2, 5, 6, 16)
    compiled_agrees(module, x)
    full = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (module(x).float() - full).abs().max() < 0.05 * full.abs().max()
    low = module.bfloat16()(x.bfloat16())
    assert (low.float() - full).abs().max() < 0.05 * full.abs().max()
    assert gradients_are_right(module, x)


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"shared_heads": 9}, "shared_heads=9 and routed_heads=None are not possible with num_heads=8"),
        ({"shared_heads": 2, "routed_heads": 7}, "routed_heads=7 are not possible"),
        ({"shared_heads": 2, "routed_heads": 0}, "of the others at least 1 is routed"),
        ({"form": "agregated"}, "Did you mean 'aggregated'"),
        ({"form": "aggregated", "input_size": (4,)}, "two for the form 'aggregated'"),
        ({"input_size": (0, 3)}, r"input_size=\(0, 3\)"),
        ({"window_size": 4}, "window_size=4 must be odd"),
        ({"sr_ratio": 0}, "sr_ratio=0 at least 1"),
    ],
)
def test_impossible_numbers_are_refused(params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make(**params)
