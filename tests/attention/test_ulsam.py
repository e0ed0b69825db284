"""Subspace attention: bounds, groups, other numbers of axes, running statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attention.ulsam import SubspaceAttention
from kernels.errors import InputError
from tests.attention.contract import ORDINARY, make_gate


def ulsam(**changes: object) -> SubspaceAttention:
    gate = make_gate("ulsam", **changes)
    assert isinstance(gate, SubspaceAttention)
    nn.init.normal_(gate.bn_dws.running_mean, std=0.3)
    nn.init.uniform_(gate.bn_dws.running_var, 0.5, 2)
    return gate


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_each_group_is_weighed_by_one_plus_a_share_of_all_places(axes: int) -> None:
    gate = ulsam(num_splits=8)
    x = torch.randn(2, 32, *ORDINARY[axes])
    out, weights = gate(x, return_attention=True)
    assert weights.shape == (2, 8, 1, *ORDINARY[axes])
    torch.testing.assert_close((weights - 1).flatten(3).sum(-1), torch.ones(2, 8, 1))
    torch.testing.assert_close(out, x * weights[:, :, 0].repeat_interleave(4, 1))
    assert weights.min() >= 1 and weights.max() <= 2


def test_a_single_place_is_doubled() -> None:
    x = torch.randn(2, 32, 1, 1)
    torch.testing.assert_close(ulsam()(x), 2 * x)


def test_a_group_decides_for_itself() -> None:
    gate = ulsam()
    x = torch.randn(1, 32, 5, 6)
    changed = x.clone()
    changed[:, :8] *= -2
    difference = (gate(changed) - gate(x)).abs().amax((0, 2, 3))
    assert (difference[:8] > 0).all() and (difference[8:] == 0).all()


def test_a_plane_of_a_volume_without_neighbours_is_an_image() -> None:
    gate = ulsam()
    x = torch.randn(2, 32, 5, 6)
    torch.testing.assert_close(gate(x[:, :, None])[:, :, 0], gate(x))


def test_running_statistics_follow_the_batch_by_nine_tenths() -> None:
    gate = ulsam().train()
    before = gate.bn_dws.running_mean.clone()
    x = torch.randn(4, 32, 5, 6)
    gate(x)
    batch = gate.conv_dws(x.flatten(2)).mean((0, 2))
    torch.testing.assert_close(gate.bn_dws.running_mean, 0.1 * before + 0.9 * batch)


def test_groups_that_do_not_divide_the_channels_are_refused() -> None:
    for splits in (5, 0):
        with pytest.raises(InputError, match=rf"num_splits={splits} does not divide 32 channels; take one of 1, 2, 4"):
            make_gate("ulsam", num_splits=splits)
