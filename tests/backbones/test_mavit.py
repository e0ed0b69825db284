"""MAViT: timm's conventions, what is in which stage, and the released names of its blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

import backbones
from attention.mala import MagnitudeAwareAttention, MagnitudeAwareBlock
from attention.window import WindowAttention
from backbones.mavit import checkpoint_filter_fn
from kernels.errors import InputError
from tests.backbones.timm_conventions import Conventions
from tests.parity.harness import OWN

TINY: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 3), "layer_scale": 0.5}


class TestMAViT(Conventions):
    name = "mavit_tiny"
    tiny: ClassVar[dict[str, Any]] = TINY

    @torch.no_grad()
    def test_the_published_size_gives_logits(self) -> None:
        model = backbones.create(self.name).eval()  # linear attention does not run on the meta device
        x = torch.randn(1, *model.pretrained_cfg["input_size"])
        assert model(x).shape == (1, 1000) and model.forward_features(x).shape == (1, 512, 7, 7)


@pytest.mark.parametrize(
    ("name", "depths", "millions"),
    [
        ("mavit_tiny", (2, 2, 6, 2), 13.9),
        ("mavit_small", (3, 5, 9, 3), 24.6),
        ("mavit_base", (4, 6, 12, 6), 47.3),
        ("mavit_large", (4, 7, 19, 8), 94.3),
    ],
)
def test_the_variants_are_those_of_the_table(name: str, depths: tuple[int, ...], millions: float) -> None:
    with torch.device("meta"):
        model = backbones.create(name)
    assert tuple(len(stage.blocks) for stage in model.stages) == depths
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_early_stages_are_linear_and_late_ones_softmax() -> None:
    model = backbones.create("mavit_tiny", **TINY)
    assert [stage.blocks[0].attn.form for stage in model.stages] == ["linear", "linear", "softmax", "softmax"]


def test_a_stages_attention_can_be_chosen() -> None:
    choice = [{"name": "window", "window_size": 3}, None, None, "agent"]
    model = backbones.create("mavit_tiny", attention=choice, img_size=(75, 106), **TINY).eval()
    kinds = [type(stage.blocks[0].attn).__name__ for stage in model.stages]
    assert kinds == [WindowAttention.__name__, *[MagnitudeAwareAttention.__name__] * 2, "AgentAttention"]
    assert model.stages[3].blocks[0].attn.input_size == (3, 4)
    assert model(torch.randn(1, 3, 75, 106)).isfinite().all()


def test_released_names_of_blocks_load_without_leftovers() -> None:
    model = backbones.create("mavit_tiny", **TINY | {"dims": (16, 16, 16, 24)})
    official = {
        key.removeprefix("state."): value
        for key, value in load_file(OWN / "attn_mala_block.safetensors").items()
        if key.startswith("state.")
    }
    block = MagnitudeAwareBlock(16, 2, hidden_dim=32, layer_scale=1.0)
    model.stages[1].blocks[0] = block
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("stages.1.blocks.0.")}
    state |= {f"layers.1.blocks.0.{key}": value for key, value in official.items()}
    renamed = checkpoint_filter_fn({"model": {f"module.{k}": v for k, v in state.items()}}, model)
    model.load_state_dict(renamed)
    torch.testing.assert_close(block.gamma_1, official["gamma_1"].flatten())
    assert checkpoint_filter_fn(renamed, model) == renamed


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"depths": (1, 1, 1)}, "one positive entry for each stage"),
        ({"forms": ("linear",)}, "each of the 4 stages"),
        ({"attention": ["window"]}, "4 stages"),
        ({"attention": "ela"}, "a token mixer"),
        ({"img_size": 0}, "img_size=0"),
    ],
    ids=str,
)
def test_what_is_impossible_is_said_in_one_sentence(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        backbones.create("mavit_tiny", **TINY | params)
