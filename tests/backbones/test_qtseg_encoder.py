"""QTSeg's encoder: timm's conventions, its three maps, released names."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

import backbones
from backbones.cross_stage import CrossStage
from kernels.errors import InputError
from tests.backbones.timm_conventions import Conventions


class TestQTSegEncoder(Conventions):
    name = "qtseg_encoder"
    tiny: ClassVar[dict[str, Any]] = {"width": 4}
    strides: ClassVar[tuple[int, ...]] = (8, 16, 32)


def test_the_parameters_are_those_of_the_table() -> None:
    with torch.device("meta"):
        model = backbones.create("qtseg_encoder", features_only=True)
    assert model.channels == (64, 128, 256)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 2.26


@pytest.mark.parametrize("training", [True, False])
def test_a_coarse_map_enters_as_if_it_were_repeated_and_concatenated(training: bool) -> None:
    block = CrossStage(10, 8, 1, shortcut=False).train(training)
    torch.nn.init.normal_(block.enter.norm.bias)
    coarse, fine = torch.randn(2, 6, 3, 4), torch.randn(2, 4, 5, 7)
    whole = torch.cat([coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :5, :7], fine], 1)
    torch.testing.assert_close(block(fine, coarse), block(whole), rtol=1e-4, atol=1e-5)


def test_fewer_levels_need_less_of_the_network() -> None:
    one = backbones.create("qtseg_encoder", features_only=True, out_indices=[0], width=4)
    assert not [name for name, _ in one.named_parameters() if "down" in name]
    assert [y.shape[1] for y in one(torch.randn(1, 3, 40, 33))] == [16]


def test_an_impossible_width_is_said() -> None:
    with pytest.raises(InputError, match="width=5 must be an even number"):
        backbones.create("qtseg_encoder", width=5)
