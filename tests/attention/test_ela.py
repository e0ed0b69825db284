"""Efficient local attention: every variant, bounds, closed forms, channels that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attention
from attention.ela import VARIANTS, EfficientLocalAttention
from kernels.errors import InputError
from tests.attention.contract import ORDINARY, make_gate
from tests.attention.contract import released as released_form

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def ela(variant: str, **changes: object) -> EfficientLocalAttention:
    gate = make_gate("ela", variant=variant, **changes)
    assert isinstance(gate, EfficientLocalAttention)
    return gate


@every_variant
def test_each_variant_is_its_released_formulation(variant: str) -> None:
    gate = ela(variant)
    run = released_form(gate, "gate")
    assert run is not None
    x = torch.randn(2, 32, 5, 6)
    torch.testing.assert_close(gate(x), run(x), rtol=1e-4, atol=1e-5)


@every_variant
def test_weights_lie_between_zero_and_one(variant: str) -> None:
    x = torch.randn(2, 32, 9, 4)
    out, weights = ela(variant)(x * 5, return_attention=True)
    low = 0.43**2 if variant == "timm" else 0  # the sigmoid of SiLU's least value, for each axis
    assert weights.shape == x.shape and weights.min() > low and weights.max() < 1
    torch.testing.assert_close(out, x * 5 * weights)


@every_variant
def test_a_norm_of_zeros_weighs_by_one_half_for_each_axis(variant: str) -> None:
    gate = ela(variant)
    for norm in gate.modules():
        if isinstance(norm, nn.GroupNorm):
            nn.init.zeros_(norm.weight)
            nn.init.zeros_(norm.bias)
    x = torch.randn(2, 32, 4, 5)
    torch.testing.assert_close(gate(x), x / 4)


@every_variant
def test_weights_are_products_of_a_row_and_a_column_profile(variant: str) -> None:
    _, weights = ela(variant)(torch.randn(1, 32, 6, 7), return_attention=True)
    columns = weights / weights[..., :1]
    torch.testing.assert_close(columns, columns[:, :, :1].expand_as(columns), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "timm"])
def test_rows_and_columns_share_their_layers_in_the_paper(variant: str) -> None:
    gate, x = ela(variant), torch.randn(2, 32, 5, 6)
    torch.testing.assert_close(gate(x.mT), gate(x).mT, rtol=1e-4, atol=1e-5)


def test_rows_and_columns_have_their_own_layers_in_timm() -> None:
    gate, x = ela("timm"), torch.randn(2, 32, 5, 6)
    assert not torch.allclose(gate(x.mT), gate(x).mT)
    for axes in (1, 3):
        with pytest.raises(InputError, match=r"variant=timm has .* takes images; got \(2, 32"):
            gate(torch.randn(2, 32, *ORDINARY[axes]))


def test_a_volume_has_a_profile_for_each_axis() -> None:
    gate, x = ela("base"), torch.randn(1, 32, 3, 4, 5)
    _, weights = gate(x, return_attention=True)
    expected = torch.ones(())
    for axis, view in ((2, (-1, 1, 1)), (3, (1, -1, 1)), (4, (1, 1, -1))):
        profile = x.mean([a for a in (2, 3, 4) if a != axis])
        expected = expected * torch.sigmoid(gate.gn(gate.conv(profile))).reshape(1, 32, *view)
    torch.testing.assert_close(weights, expected)


def test_channels_that_a_variant_does_not_take_are_refused_with_those_that_fit() -> None:
    with pytest.raises(InputError, match=r"base needs channels in multiples of 16 and this map has 24; .* fit: timm"):
        make_gate("ela", dim=24)
    with pytest.raises(InputError, match=r"tiny needs channels in multiples of 32 .* fit: base, small, large, timm"):
        make_gate("ela", dim=48, variant="tiny")
    with pytest.raises(InputError, match=r"'huge' is not known"):
        make_gate("ela", variant="huge")


def test_the_papers_state_has_one_convolution_and_one_norm() -> None:
    gate = attention.create("ela", dim=32)
    assert sorted(gate.state_dict()) == ["conv.weight", "gn.bias", "gn.weight"]
