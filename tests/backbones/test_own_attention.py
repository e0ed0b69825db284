"""Modules of a user's own in backbones: classes, paths, and blocks that alternate."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import backbones
from attention.adapters import TokenBlockMixer
from attention.mixer import Mixer
from attention.window import WindowAttention
from backbones.trial import main as trial
from kernels.errors import InputError


class Half(nn.Module):
    """A gate."""

    kind: ClassVar[str] = "gate"

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_a_class_defined_anywhere_is_taken() -> None:
    class Mean(Mixer):
        kind: ClassVar[str] = "mixer"

        def __init__(self, dim: int, num_heads: int) -> None:
            super().__init__(dim, num_heads)

        def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
            return x.mean((1, 2), keepdim=True).expand_as(x)

    for choice in (Mean, [Mean, None, {"name": Mean}, "softmax"]):
        model = backbones.create("pvt_v2_b0", attention=choice)
        assert any(isinstance(module, Mean) for module in model.modules())
    with pytest.raises(InputError, match="attention 'Mean' has no parameter 'size'"):
        backbones.create("pvt_v2_b0", attention={"name": Mean, "size": 3})
    with pytest.raises(InputError, match="a Mean is not understood"):
        backbones.create("pvt_v2_b0", attention=Mean(8, 2))


def test_spiking_stages_shift_the_windows_of_every_other_block() -> None:
    model = backbones.create("metaspikformer_8_384", attention="window", time_steps=1)
    shifts = [module.shift for module in model.modules() if isinstance(module, WindowAttention)]
    assert set(shifts) == {0, 3}


def test_a_path_of_another_kind_is_refused_before_anything_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert trial(["softmax", f"{__name__}:Half", "--seeds", "1", "--steps", "1"]) == 1
    answer = capsys.readouterr().err
    assert "Half' is of kind 'gate'" in answer and "softmax, seed" not in answer


def test_token_blocks_shift_the_windows_of_every_other_block() -> None:
    from attention.adapters import _make

    shifts = [_make("window", 8, 2, (14, 14), index, {}).shift for index in range(2)]
    assert shifts == [0, 3]
    assert TokenBlockMixer(_make("window", 8, 2, (4, 4), 1, {}), (4, 4))(torch.ones(1, 16, 8)).shape == (1, 16, 8)
