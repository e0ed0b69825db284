"""DuoFormer: timm's conventions, its scales, its pyramid, the released names of its transformer."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

import backbones
from backbones.duoformer import checkpoint_filter_fn
from kernels.errors import InputError
from tests.backbones import test_global_deit
from tests.parity.harness import SHARED, load_case

TINY: dict[str, Any] = {"trunk": "resnet10t", "embed_dim": 12, "depth": 2, "num_heads": 2, "img_size": 64}


class TestDuoFormer(test_global_deit.TestAgentDeiT):
    name = "duoformer_resnet50_s4"
    tiny: ClassVar[dict[str, Any]] = TINY
    strides: ClassVar[tuple[int, ...]] = (4, 8, 16, 32)

    @torch.no_grad()
    def test_the_published_size_gives_logits(self) -> None:
        with torch.device("meta"):
            model = backbones.create(self.name).eval()
        x = torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")
        assert model(x).shape == (2, 1000) and model.forward_features(x).shape == (2, 50, 768)

    def test_first_convolution_and_classifier_are_where_the_description_says(self) -> None:
        model = backbones.create("duoformer_resnet18_s4", in_chans=1, num_classes=7, **TINY | {"trunk": "resnet18"})
        state, cfg = model.state_dict(), model.default_cfg
        assert state[f"{cfg['first_conv']}.weight"].shape[1] == 1 == model.in_chans
        assert f"{cfg['classifier']}.weight" in state and model.get_classifier() is model.head
        assert model.eval()(torch.randn(2, 1, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "tokens", "millions"),
    [
        ("duoformer_resnet50_s2", 6, 186.1),
        ("duoformer_resnet50_s3", 22, 186.5),
        ("duoformer_resnet50_s4", 86, 186.8),
        ("duoformer_resnet18_s4", 86, 149.0),
    ],
)
def test_the_variants_are_those_of_the_table(name: str, tokens: int, millions: float) -> None:
    with torch.device("meta"):
        model = backbones.create(name)
    assert model.transformer.pos_embed_for_scale.shape == (1, 1, tokens, 768)
    assert model.transformer.pos_embed.shape == (1, 50, 768)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("params", [{"scale_token": "learned"}, {"form": "vit", "layer_scale": 0.5}, {"qk_norm": True}])
def test_every_form_learns_in_every_parameter(params: dict[str, Any]) -> None:
    model = backbones.create("duoformer_resnet50_s2", drop_path_rate=0.1, num_classes=3, **TINY | params)
    assert model.feature_info[0]["reduction"] == 16 and len(model.feature_info) == 2
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_patches_do_not_see_each_other_in_the_pyramid_beyond_the_trunk() -> None:
    model = backbones.create("duoformer_resnet50_s3", **TINY | {"scale_token": "learned"}).eval()
    trunk_maps = model.trunk(torch.randn(1, 3, 64, 96))
    model.trunk.forward = lambda x: trunk_maps
    before = model.forward_intermediates(torch.empty(1, 3, 64, 96), intermediates_only=True)
    trunk_maps[1][:, :, 5, 9] += 1  # stride 8: row 1, column 2 of the patches
    after = model.forward_intermediates(torch.empty(1, 3, 64, 96), intermediates_only=True)
    for old, new, side in zip(before, after, (4, 2, 1), strict=True):
        changed = (old != new).any(1)[0]
        assert changed[side:, 2 * side :].all() and changed.sum() == side**2


@torch.no_grad()
def test_another_attention_between_patches() -> None:
    model = backbones.create("duoformer_resnet50_s2", attention="window", **TINY).eval()
    assert {block.mixer.name for block in model.transformer.patch_blocks} == {"window"}
    assert model(torch.randn(1, 3, 70, 100)).isfinite().all()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the larger parity cases are not beside this checkout")
@pytest.mark.parametrize("name", ["duoformer_scale3", "duoformer_vit"])
@torch.no_grad()
def test_released_names_of_the_transformer_load_without_leftovers(name: str) -> None:
    case = load_case(SHARED / f"{name}.json")
    config = case.config
    form = {"form": "vit", "layer_scale": 0.5, "scales": 2} if name.endswith("vit") else {"scales": 3}
    params = {**TINY, **form, "scale_token": "learned", "img_size": 224}
    params |= {key: config[key] for key in ("num_classes", "embed_dim", "depth", "num_heads")}
    model = backbones.create("duoformer_resnet50_s4", **params).eval()
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith(("transformer.", "head."))}
    state = checkpoint_filter_fn({"model": rest | case.state}, model)
    model.load_state_dict(state)
    x = case.inputs["x"]
    logits = model.forward_head(model.transformer(x))
    torch.testing.assert_close(logits, case.expected["output.logits"], rtol=1e-4, atol=1e-4)
    smaller = backbones.create("duoformer_resnet50_s4", **params | {"img_size": 64})
    smaller.load_state_dict(checkpoint_filter_fn(state, smaller))
    assert smaller.transformer.pos_embed.shape[1] == 5


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"scales": 1}, "scales=1"),
        ({"scale_token": "chanel"}, "Did you mean 'channel'"),
        ({"form": "swin"}, "form"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"trunk": "vit_tiny_patch16_224"}, "4, 8, 16 and 32"),
    ],
    ids=str,
)
def test_what_is_impossible_is_said_in_one_sentence(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        backbones.create("duoformer_resnet50_s4", **TINY | params)
