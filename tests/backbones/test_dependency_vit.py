"""DependencyViT: timm's conventions, messages, tokens that leave, dependency masks."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import backbones
from backbones.dependency_vit import checkpoint_filter_fn
from kernels.errors import InputError
from tests.backbones.timm_conventions import Conventions

TINY: dict[str, Any] = {"depth": 4, "embed_dim": 16, "num_heads": 4, "img_size": 64}
LITE: dict[str, Any] = {**TINY, "lite": True, "prune_after": (1, 3), "prune_share": 0.25}


class TestDependencyViT(Conventions):
    name = "dependencyvit_tiny"
    tiny: ClassVar[dict[str, Any]] = TINY
    strides: ClassVar[tuple[int, ...]] = (16, 16, 16, 16)

    @torch.no_grad()
    def test_the_published_size_gives_logits(self) -> None:
        model = backbones.create(self.name, **{k: v for k, v in self.tiny.items() if k == "lite"}).eval()
        x = torch.randn(1, *model.pretrained_cfg["input_size"])
        assert model(x).shape == (1, 1000) and model.forward_features(x).shape == (1, 192, 14, 14)


class TestLite(TestDependencyViT):
    tiny: ClassVar[dict[str, Any]] = LITE


def test_the_variants_are_those_of_the_table() -> None:
    for name, dim, millions in (("dependencyvit_tiny", 192, 6.0), ("dependencyvit_small", 384, 23.0)):
        with torch.device("meta"):
            model = backbones.create(name)
        assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (dim, 12, 12)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@torch.no_grad()
def test_tokens_that_do_not_send_do_not_count() -> None:
    model = backbones.create("dependencyvit_tiny", **TINY).eval()
    x = torch.randn(1, 3, 64, 64)
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: seen.append(out[1]))
    features = model.forward_features(x)
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(seen))
    message = seen[-1].view(1, 1, 4, 4)
    plain = model.forward_intermediates(x, norm=True, intermediates_only=True)[-1]
    torch.testing.assert_close(features, plain * message)


@torch.no_grad()
def test_with_lite_a_quarter_of_the_tokens_leaves_each_time_and_stays_in_the_maps() -> None:
    model, x = backbones.create("dependencyvit_tiny", **LITE).eval(), torch.randn(2, 3, 64, 64)
    seen: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: seen.append(tuple(args[0].shape)))
    features, maps = model.forward_intermediates(x)
    assert [shape[1] for shape in seen] == [16, 12, 12, 9]
    assert (features.abs().sum(1) > 0).sum((1, 2)).tolist() == [9, 9]
    changed = [(a - b).abs().sum(1).ne(0).sum((1, 2)).tolist() for a, b in itertools.pairwise(maps)]
    assert changed == [[12, 12], [12, 12], [9, 9]]


@torch.no_grad()
def test_the_least_sending_tokens_leave() -> None:
    model, x = backbones.create("dependencyvit_tiny", **LITE).eval(), torch.randn(1, 3, 64, 64)
    tokens = model.embed(x)
    _, message = model.blocks[0](tokens.x, tokens.grid, None)
    left = sorted(set(range(16)) - set(model.step(0, model.blocks[0], tokens).extras["places"][0].tolist()))
    assert left == sorted(message[0].argsort()[:4].tolist())


@torch.no_grad()
def test_dependency_masks_share_out_what_a_token_sends() -> None:
    model, x = backbones.create("dependencyvit_tiny", **TINY).eval(), torch.randn(2, 3, 48, 64)
    masks = model.dependencies(x)
    assert len(masks) == 4 and all(mask.shape == (2, 12, 12) for mask in masks)
    sent = [mask.sum(1) for mask in masks]
    assert all((mass <= 1 + 1e-5).all() for mass in sent) and (sent[3] <= sent[0]).all()
    with pytest.raises(InputError, match="lite"):
        backbones.create("dependencyvit_tiny", **LITE).dependencies(x)


def test_another_attention_has_no_messages() -> None:
    model = backbones.create("dependencyvit_tiny", attention="window", **TINY).eval()
    x = torch.randn(1, 3, 64, 90)
    assert model(x).isfinite().all()
    torch.testing.assert_close(
        model.forward_features(x), model.forward_intermediates(x, norm=True, intermediates_only=True)[-1]
    )


def test_positions_of_another_image_size_are_resized() -> None:
    large, model = (
        backbones.create("dependencyvit_tiny", **TINY | {"img_size": 96}),
        backbones.create("dependencyvit_tiny", **TINY),
    )
    nn.init.constant_(large.pos_embed, 0.5)
    model.load_state_dict(checkpoint_filter_fn({"model": large.state_dict()}, model))
    torch.testing.assert_close(model.pos_embed, torch.full((1, 16, 16), 0.5))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"depth": 0}, "depth=0"),
        ({"prune_share": 1.0}, "prune_share=1.0"),
        ({"lite": True, "attention": "window"}, "lite=true"),
        ({"num_heads": 3}, "num_heads"),
    ],
    ids=str,
)
def test_what_is_impossible_is_said_in_one_sentence(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        backbones.create("dependencyvit_tiny", **TINY | params)
