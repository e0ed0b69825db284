"""Agent-DeiT and InLine-DeiT: timm's conventions, equality with timm's DeiT, rectangles, the released names."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import nn

import backbones
from backbones.global_deit import PrefixAgent, PrefixInLine, checkpoint_filter_fn
from kernels.errors import InputError
from tests.backbones.timm_conventions import Conventions

TINY: dict[str, Any] = {"depth": 4, "embed_dim": 16, "num_heads": 2, "agents": 4, "img_size": 64}


class TestAgentDeiT(Conventions):
    name = "agent_deit_tiny"
    tiny: ClassVar[dict[str, Any]] = TINY
    strides: ClassVar[tuple[int, ...]] = (16, 16, 16, 16)

    @torch.no_grad()
    def test_the_published_size_gives_logits(self) -> None:
        model = backbones.create(self.name).eval()
        x = torch.randn(1, *model.pretrained_cfg["input_size"])
        assert model(x).shape == (1, 1000) and model.forward_features(x).shape == (1, 197, 192)

    @torch.no_grad()
    def test_the_classifier_can_be_replaced_and_removed(self) -> None:
        model, x = self.build().eval(), torch.randn(1, 3, 64, 64)
        tokens = model.forward_features(x)
        model.reset_classifier(5)
        assert model(x).shape == (1, 5) and model.num_classes == 5
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), tokens[:, 0])
        model.reset_classifier(0, "avg")
        torch.testing.assert_close(model(x), tokens[:, 1:].mean(1))
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(x), tokens)
        with pytest.raises(InputError, match="global_pool"):
            model.reset_classifier(0, "max")
        assert self.build(num_classes=0).eval()(x).shape == (1, model.head_hidden_size)


class TestInLineDeiT(TestAgentDeiT):
    name = "inline_deit_tiny"


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("agent_deit_tiny", 6.02),
        ("agent_deit_small", 22.65),
        ("agent_deit_base", 87.20),
        ("inline_deit_tiny", 6.48),
        ("inline_deit_small", 16.73),
        ("inline_deit_base", 23.80),
    ],
)
def test_parameters_are_as_many_as_published(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = backbones.create(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@torch.no_grad()
def test_without_global_blocks_it_is_deit() -> None:
    params = {"depth": 4, "embed_dim": 16, "num_heads": 2, "img_size": 64}
    theirs = timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True, **params).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours = backbones.create("agent_deit_tiny", global_blocks=0, **params).eval()
    ours.load_state_dict(checkpoint_filter_fn({"model": theirs.state_dict()}, ours))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    maps = theirs.forward_intermediates(x, indices=4, intermediates_only=True)
    torch.testing.assert_close(ours.forward_intermediates(x, intermediates_only=True), maps, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attn", [PrefixAgent(16, 2, (4, 4), 4, prefix=1), PrefixInLine(16, 2, prefix_tokens=1)])
def test_on_squares_the_told_grid_changes_nothing(attn: Any) -> None:
    x = torch.randn(2, 26, 16)
    torch.testing.assert_close(attn.on_grid(x, (5, 5)), attn(x))


def test_the_class_token_reads_beside_a_chosen_mixer() -> None:
    model = backbones.create("inline_deit_tiny", attention="window", **TINY).eval()
    assert {block.attn.mixer.name for block in model.blocks} == {"window"}
    x = torch.randn(1, 3, 64, 90, requires_grad=True)
    model(x)[0, 0].backward()
    assert x.grad is not None and (x.grad.abs().sum((0, 1)) > 0).all()


@pytest.mark.parametrize("name", ["agent_deit_tiny", "inline_deit_tiny"])
def test_released_names_load_without_leftovers_also_for_another_image_size(name: str) -> None:
    trained, model = backbones.create(name, **TINY | {"img_size": 96}), backbones.create(name, **TINY)
    released = {}
    for key, value in trained.state_dict().items():
        key = key.replace("patch_embed.", "patch_embed.proj.").replace("attn.bias.", "attn.")
        released[f"module.{key}"] = value
    assert ("module.blocks.0.attn.an_bias" in released) == (name == "agent_deit_tiny")
    model.load_state_dict(checkpoint_filter_fn({"state_dict": released}, model))
    again = model.state_dict()
    assert checkpoint_filter_fn(again, model).keys() == again.keys()


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"mixer": "agnet"}, "Did you mean 'agent'"),
        ({"depth": 0}, "depth=0"),
        ({"agents": 5}, "agents=5"),
        ({"attention": ["window", "window"]}, "one entry"),
        ({"global_pool": "max"}, "global_pool"),
    ],
    ids=str,
)
def test_what_is_impossible_is_said_in_one_sentence(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        backbones.create("agent_deit_tiny", **TINY | params)
