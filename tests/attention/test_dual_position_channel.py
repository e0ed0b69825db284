"""Dual attention: forms, equivariances, closed forms, large maps in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attention
from attention.dual_position_channel import ChannelAttention, DualAttention, PositionAttention
from kernels.errors import InputError
from tests.attention.contract import ORDINARY, make_gate
from tests.attention.contract import released as released_form

every_form = pytest.mark.parametrize("form", ["danet", "daunet"])


def dual(**changes: object) -> DualAttention:
    gate = make_gate("dual_position_channel", **changes)
    assert isinstance(gate, DualAttention)
    return gate


@every_form
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_it_is_what_matrices_of_places_give(form: str, axes: int) -> None:
    gate = dual(form=form)
    run = released_form(gate, "gate")
    assert run is not None
    x = torch.randn(2, 32, *ORDINARY[axes])
    torch.testing.assert_close(gate(x), run(x), rtol=1e-4, atol=1e-4)


@every_form
def test_each_branch_starts_as_the_map(form: str) -> None:
    gate = attention.create("dual_position_channel", kind="gate", dim=16, form=form)
    x = torch.randn(2, 16, 4, 5)
    torch.testing.assert_close(gate(x), 2 * x)


@every_form
def test_permuted_places_give_permuted_outputs(form: str) -> None:
    gate, x = dual(form=form), torch.randn(1, 32, 30)
    order = torch.randperm(30)
    torch.testing.assert_close(gate(x[..., order]), gate(x)[..., order], rtol=1e-4, atol=1e-4)


@every_form
def test_permuted_channels_give_permuted_sums_of_channels(form: str) -> None:
    module, x = ChannelAttention(form), torch.randn(2, 8, 3, 4)
    nn.init.ones_(module.gamma)
    order = torch.randperm(8)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])


def test_channel_weights_sum_to_one_over_inputs_or_over_outputs() -> None:
    x = torch.randn(2, 32, 5, 6) * 0.3
    for form, axis in (("danet", -1), ("daunet", -2)):
        _, weights = dual(form=form)(x, return_attention=True)
        assert weights.shape == (2, 32, 32)
        torch.testing.assert_close(weights.sum(axis), torch.ones(2, 32))


def test_unlike_channels_weigh_most_in_one_form_and_like_ones_in_the_other() -> None:
    x = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]]).view(1, 3, 1, 2) * 3
    _, danet = ChannelAttention("danet").branch(x)
    assert danet[0, 0].argmax() == 2 and danet[0, 2, :2].min() > 0.4
    _, daunet = ChannelAttention("daunet").branch(x)
    assert daunet[0, 0, :2].min() > 0.4 and daunet[0, 2].argmax() == 2


def test_equal_places_attend_alike_to_their_common_value() -> None:
    module = PositionAttention(16)
    nn.init.ones_(module.gamma)
    x = torch.randn(2, 16, 1, 1).expand(2, 16, 4, 3)
    value = module.qkv(x[:, :, 0, 0])[:, -16:]
    torch.testing.assert_close(module(x), x + value[:, :, None, None])


@pytest.mark.parametrize("places", [(5, 7), (21, 33)])
def test_scores_of_places_sum_over_the_narrow_queries_alone(places: tuple[int, int]) -> None:
    gate, number = dual(), places[0] * places[1]
    (part,) = (p for p in gate.cost((2, *places)) if p.name == "places")
    with FlopCounterMode(display=False) as counter:
        gate.position.branch(torch.randn(2, 32, *places))
    width = gate.position.width
    assert part.flops == 2 * 2 * number**2 * (width + 32)
    assert counter.get_total_flops() == part.flops + 2 * 2 * number * 32 * (32 + 2 * width)


def test_products_of_channels_beyond_float16_stay_finite() -> None:
    module = ChannelAttention("danet").half()
    nn.init.ones_(module.gamma)
    x = torch.full((1, 4, 32, 32), 10.0, dtype=torch.float16)  # each product is 102400
    torch.testing.assert_close(module(x), 2 * x)


@every_form
def test_released_states_of_both_modules_load(form: str) -> None:
    bias = form == "danet"
    convs = {n: nn.Conv2d(16, w, 1, bias=bias) for n, w in (("query", 2), ("key", 2), ("value", 16))}
    state = {f"sa.{n}_conv.{key}": value for n, conv in convs.items() for key, value in conv.state_dict().items()}
    state |= {"sa.gamma": torch.tensor([0.5]), "sc.gamma": torch.tensor([0.25])}
    gate = attention.create("dual_position_channel", kind="gate", dim=16, form=form)
    attention.load_official(gate, state)
    assert isinstance(gate, DualAttention) and gate.channel.gamma.item() == 0.25
    x = torch.randn(1, 16, 3, 4)
    expected = torch.cat([convs[n](x) for n in ("query", "key", "value")], 1)
    torch.testing.assert_close(gate.position.qkv(x.movedim(1, -1)).movedim(-1, 1), expected)


def test_narrow_maps_keep_one_channel_of_queries() -> None:
    assert PositionAttention(5).width == 1
    assert PositionAttention(64, reduction=4).width == 16


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'daunet'"):
        dual(form="daunett")
    with pytest.raises(InputError, match="is not known"):
        ChannelAttention("sum")
    with pytest.raises(InputError, match=r"reduction=0 must be at least 1"):
        dual(reduction=0)
