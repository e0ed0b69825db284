"""Polarized self-attention: both forms in every number of axes, bounds, closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attention.polarized import PolarizedAttention
from kernels.errors import InputError
from tests.attention.contract import ORDINARY, make_gate
from tests.attention.contract import released as released_form

NAMES = ("polarized_parallel", "polarized_sequential")
every_name = pytest.mark.parametrize("name", NAMES)
every_form = pytest.mark.parametrize("form", ["paper", "released"])


def polarized(name: str, form: str) -> PolarizedAttention:
    gate = make_gate(name, form=form)
    assert isinstance(gate, PolarizedAttention)
    return gate


@every_name
@every_form
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_folded_queries_give_what_projected_maps_give(name: str, form: str, axes: int) -> None:
    gate = polarized(name, form)
    run = released_form(gate, "gate")
    assert run is not None
    x = torch.randn(2, 32, *ORDINARY[axes])
    torch.testing.assert_close(gate(x), run(x), rtol=1e-4, atol=1e-5)


@every_name
@every_form
def test_gates_stay_within_their_bounds(name: str, form: str) -> None:
    gate = polarized(name, form)
    _, weights = gate(torch.randn(2, 32, 9, 7) * 3, return_attention=True)
    low, high = {
        ("polarized_parallel", "paper"): (0.0, 2.0),
        ("polarized_parallel", "released"): (0.5, 1.74),  # its spatial gate is the sigmoid of a share
    }.get((name, form), (0.0, 1.0))
    assert weights.min() > low and weights.max() < high


@every_name
@every_form
def test_a_rotated_map_gives_the_rotated_output(name: str, form: str) -> None:
    gate = polarized(name, form)
    x = torch.randn(1, 32, 5, 6)
    torch.testing.assert_close(gate(x.rot90(dims=(2, 3))), gate(x).rot90(dims=(2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "form", "weight"), [(NAMES[0], "paper", 1.0), (NAMES[1], "paper", 0.25)])
def test_layers_of_zeros_weigh_by_one_half_each(name: str, form: str, weight: float) -> None:
    gate = polarized(name, form)
    for parameter in gate.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 32, 4, 5)
    torch.testing.assert_close(gate(x), weight * x)


def test_the_released_spatial_gate_is_a_share_of_all_places() -> None:
    gate = polarized("polarized_parallel", "released")
    place = gate.spatial_gate(torch.randn(2, 32, 30), None)
    torch.testing.assert_close(torch.logit(place).sum(-1), torch.ones(2))


def test_the_mean_over_places_decides_the_spatial_gate_of_a_uniform_map() -> None:
    gate = polarized("polarized_sequential", "paper")
    _, weights = gate(torch.randn(1, 32, 1, 1).expand(1, 32, 6, 4), return_attention=True)
    torch.testing.assert_close(weights, weights[..., :1, :1].expand_as(weights))


def test_the_released_sequential_form_costs_a_projected_map_and_the_others_do_not() -> None:
    shape = (2, 16, 16)
    flops = {(n, f): polarized(n, f).flops(shape) for n in NAMES for f in ("paper", "released")}
    projected = 2 * 2 * 256 * 32 * 16
    assert flops[NAMES[1], "released"] > projected
    assert all(value < projected for key, value in flops.items() if key != (NAMES[1], "released"))


def test_forms_and_channels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'released'"):
        make_gate(NAMES[0], form="release")
    with pytest.raises(InputError, match=r"form=paper needs channels in multiples of 2 and this map has 5"):
        make_gate(NAMES[0], dim=5)
    with pytest.raises(InputError, match=r"form=released needs channels in multiples of 8 and this map has 12"):
        make_gate(NAMES[1], dim=12, form="released")
    make_gate(NAMES[1], dim=12)
