"""Agent-Swin and InLine-Swin: timm's conventions, what is where, equality with timm's Swin, the released names."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn

import backbones
from backbones.global_swin import checkpoint_filter_fn
from kernels.errors import InputError
from tests.backbones.timm_conventions import Conventions

TINY: dict[str, Any] = {
    "depths": (1, 1, 2, 2),
    "dims": (8, 16, 16, 32),
    "num_heads": (1, 2, 2, 4),
    "global_blocks": (1, 1, 1, 0),
    "agents": (4, 4, 4, 4),
    "img_size": 64,
}


class TestAgentSwin(Conventions):
    name = "agent_swin_tiny"
    tiny: ClassVar[dict[str, Any]] = TINY

    @torch.no_grad()
    def test_the_published_size_gives_logits(self) -> None:
        model = backbones.create(self.name).eval()  # window attention does not run on the meta device
        x = torch.randn(1, *model.pretrained_cfg["input_size"])
        assert model(x).shape == (1, 1000) and model.forward_features(x).shape == (1, 768, 7, 7)


class TestInLineSwin(TestAgentSwin):
    name = "inline_swin_tiny"


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("agent_swin_tiny", 29),
        ("agent_swin_small", 50),
        ("agent_swin_base", 88),
        ("inline_swin_tiny", 29),  # published as 30
        ("inline_swin_small", 50),
        ("inline_swin_base", 88),
    ],
)
def test_parameters_are_as_many_as_published(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = backbones.create(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_each_stage_has_the_attention_of_the_paper() -> None:
    def letters(name: str) -> list[str]:
        with torch.device("meta"):
            model = backbones.create(name)
        return ["".join(block.attn.name[0] for block in stage.blocks) for stage in model.stages]

    assert letters("agent_swin_tiny") == ["aa", "aa", "aaaaaa", "ww"]
    assert letters("inline_swin_small") == ["ii", "ii", "w" * 18, "ww"]
    assert letters("agent_swin_base") == ["aa", "aa", "aa" + "w" * 16, "ww"]
    with torch.device("meta"):
        model = backbones.create("agent_swin_base")
    assert [block.attn.shift for block in model.stages[2].blocks[2:6]] == [0, 3, 0, 3]
    agents = [stage.blocks[0].attn.agent_grid for stage in model.stages[:3]]
    assert agents == [(3, 3), (4, 4), (7, 7)]


def test_a_stages_attention_can_be_chosen() -> None:
    model = backbones.create("agent_swin_tiny", attention=["softmax", None, None, "mala"], **TINY).eval()
    names = [[block.attn.name for block in stage.blocks] for stage in model.stages]
    assert names == [["softmax"], ["agent"], ["agent", "window"], ["mala"] * 2]
    assert model(torch.randn(1, 3, 64, 90)).isfinite().all()


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names as Microsoft's code, on which the released ones are built, has them."""
    found = {}
    for key, value in state.items():
        parts = key.replace("head.fc.", "head.").split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        found[".".join(parts)] = value
        if key.endswith("relative_position_bias_table"):
            found[f"{'.'.join(parts[:-1])}.relative_position_index"] = torch.zeros(49, 49)
    return found


@torch.no_grad()
def test_without_global_blocks_it_is_swin() -> None:
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 2, 2, 1), num_heads=(1, 2, 2, 4), img_size=224
    ).eval()
    ours = backbones.create(
        "agent_swin_tiny",
        depths=(1, 2, 2, 1),
        dims=(8, 16, 32, 64),
        num_heads=(1, 2, 2, 4),
        global_blocks=(0, 0, 0, 0),
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours.load_state_dict(checkpoint_filter_fn({"model": official(theirs.state_dict())}, ours))
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    maps = theirs.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(ours.forward_intermediates(x, intermediates_only=True), maps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["agent_swin_tiny", "inline_swin_tiny"])
def test_released_names_load_without_leftovers_also_for_another_image_size(name: str) -> None:
    trained, model = backbones.create(name, **TINY | {"img_size": 32}), backbones.create(name, **TINY)
    released = {}
    for key, value in trained.state_dict().items():
        key = key.replace("stem.", "patch_embed.").replace("head.fc.", "head.").replace("attn.bias.", "attn.")
        parts = key.replace("stages.", "layers.").split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        released[f"module.{'.'.join(parts)}"] = value
    assert ("module.layers.0.blocks.0.attn.an_bias" in released) == (name == "agent_swin_tiny")
    model.load_state_dict(checkpoint_filter_fn({"state_dict": released}, model))
    again = model.state_dict()
    assert checkpoint_filter_fn(again, model).keys() == again.keys()


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"mixer": "agnet"}, "Did you mean 'agent'"),
        ({"global_blocks": (1, 1)}, "one entry for each stage"),
        ({"agents": (5, 4, 4, 4)}, "agents=5"),
        ({"attention": "abmil"}, "'abmil' is of kind 'pooling'"),
    ],
    ids=str,
)
def test_what_is_impossible_is_said_in_one_sentence(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        backbones.create("agent_swin_tiny", **TINY | params)
