"""BiFormer: timm's conventions, its options for dense use, other attention in it, and its released weights' names."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from hydra import compose, initialize_config_module
from timm.layers.drop import DropPath
from torch import Tensor, nn

import backbones
from backbones.biformer import checkpoint_filter_fn
from kernels.errors import InputError
from tests.backbones.timm_conventions import ODD, Conventions
from tests.parity.recipe import about

SMALL: dict[str, Any] = {
    "depths": (1, 1, 2, 1),
    "dims": (16, 32, 48, 64),
    "head_dim": 16,
    "regions": 2,
    "topk": (1, 2, 4, None),
}
WIDTHS = [16, 32, 48, 64]
VARIANTS = {
    "biformer_tiny": 13_142_760,
    "biformer_small": 25_536_232,
    "biformer_base": 56_804_968,
    "biformer_stl": 28_372_552,
    "biformer_stl_nchw": 28_372_552,
}


def small(name: str = "biformer_tiny", **params: Any) -> Any:
    return backbones.create(name, **{**SMALL, "num_classes": 7, **params}).eval()


def official(case: str) -> dict[str, Tensor]:
    """The released names, with tensors that have a shape alone."""
    return {name: torch.empty(shape, device="meta") for name, shape in about(case)["state_shapes"].items()}


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Without the counters of batch normalisation, which the lists of released names leave out."""
    return {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}


class TestConvolutions(Conventions):
    name = "biformer_tiny"
    tiny: ClassVar[dict[str, Any]] = {**SMALL, "mlp_conv": True, "layer_scale": 0.5}

    @torch.no_grad()
    def test_the_published_size_gives_logits(self) -> None:
        """With numbers: the choice of regions switches autocast off, which the meta device has no notion of."""
        model = backbones.create(self.name).eval()
        x = torch.randn(1, 3, *model.pretrained_cfg["input_size"][1:])
        features = model.forward_features(x)
        assert features.shape == (1, model.num_features, *model.pretrained_cfg["pool_size"])
        logits = model.forward_head(features)
        assert logits.shape == (1, 1000) and logits.isfinite().all()


class TestPatches(TestConvolutions):
    name = "biformer_stl_nchw"
    tiny: ClassVar[dict[str, Any]] = SMALL


@pytest.mark.parametrize(("name", "parameters"), VARIANTS.items())
def test_parameters_are_as_many_as_published(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = backbones.create(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", VARIANTS)
def test_each_configuration_composes_and_names_a_backbone(name: str) -> None:
    with initialize_config_module("conf", version_base=None):
        cfg = compose(overrides=[f"+backbone={name}"]).backbone
    assert dict(cfg) == {"name": name, "pretrained": False, "checkpoint": None, "params": {}}
    assert cfg.name in backbones.available()


def test_the_published_attention_is_in_its_stages() -> None:
    with torch.device("meta"):
        models = {name: backbones.create(name) for name in ("biformer_base", "biformer_stl_nchw")}
    mixers = [stage.blocks[0].mixer for stage in models["biformer_base"].stages]
    assert [(m.num_heads, m.topk, m.dense) for m in mixers] == [
        (3, 1, False),
        (6, 4, False),
        (12, 16, False),
        (8, 1, True),
    ]
    assert [m.qkv.bias is None for m in mixers] == [False, False, False, True]
    assert {m.form for m in mixers} == {"legacy"} and {m.regions for m in mixers} == {(7, 7)}
    assert {s.blocks[0].mixer.form for s in models["biformer_stl_nchw"].stages} == {"refactored"}


@torch.no_grad()
@pytest.mark.parametrize("form", ["legacy", "refactored"])
def test_weights_serve_any_regions_and_all_of_them_are_full_attention(form: str) -> None:
    model, x = small(regions=1, topk=(1, 1, 1, None), form=form), torch.randn(1, 3, *ODD)
    for regions, topk in ((2, (4, 4, 4, None)), ((3, 2, 4, 1), (9, 4, 16, None))):
        other = small(regions=regions, topk=topk, form=form)
        other.load_state_dict(model.state_dict())
        if form == "legacy":  # the refactored form may have more regions than asked for
            torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
        assert other(x).isfinite().all()


@torch.no_grad()
def test_zeros_beyond_the_map_are_seen_on_request_only() -> None:
    divided, odd = torch.randn(1, 3, 64, 128), torch.randn(1, 3, *ODD)
    hidden, seen = small(), small(padding="released")
    seen.load_state_dict(hidden.state_dict())
    torch.testing.assert_close(seen(divided), hidden(divided))
    assert not torch.allclose(seen(odd), hidden(odd), atol=1e-4)
    with pytest.raises(InputError, match="do not divide"):
        small(padding="error")(odd)


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model, x = small(), torch.randn(3, 3, *ODD)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_each_level_has_a_norm_that_the_next_stage_does_not_see() -> None:
    plain, x = small(), torch.randn(1, 3, *ODD)
    normed = small(level_norms=True)
    normed.load_state_dict(checkpoint_filter_fn(plain.state_dict(), normed))
    normed.level_norms["0"].bias.fill_(3)
    torch.testing.assert_close(normed(x), plain(x))
    final, maps = normed.forward_intermediates(x)
    torch.testing.assert_close(final, plain.forward_features(x))
    for i, (ours, raw) in enumerate(zip(maps, plain.forward_intermediates(x)[1], strict=True)):
        wanted = nn.functional.layer_norm(raw.movedim(1, -1), raw.shape[1:2], eps=1e-6).movedim(-1, 1)
        torch.testing.assert_close(ours, wanted + (3 if i == 0 else 0), rtol=1e-4, atol=1e-4)


def test_a_pyramid_has_the_norms_of_its_own_levels_and_trains_whole() -> None:
    pyramid = small(level_norms=True, features_only=True, out_indices=(1, 3)).train()
    assert set(pyramid.model.level_norms) == {"1", "3"}
    maps = pyramid(torch.randn(2, 3, *ODD))
    assert [tuple(y.shape) for y in maps] == [(2, 32, 10, 14), (2, 64, 3, 4)]
    assert all(y.is_contiguous() for y in maps)
    torch.stack([y.pow(3).sum() for y in maps]).sum().backward()
    assert [n for n, p in pyramid.named_parameters() if p.grad is None] == []


def test_each_stage_may_have_another_mixer() -> None:
    model = small(attention=["window", None, {"name": "bi_level_routing", "topk": 1, "regions": 3}, "softmax"])
    mixers = [stage.blocks[0].mixer for stage in model.stages]
    assert [m.name for m in mixers] == ["window", "bi_level_routing", "bi_level_routing", "softmax"]
    assert [m.num_heads for m in mixers] == [1, 2, 3, 4]
    assert [(m.topk, m.regions) for m in mixers[1:3]] == [(2, (2, 2)), (1, (3, 3))]
    model(torch.randn(2, 3, *ODD)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert any("bias_table" in name for name in model.no_weight_decay())


def test_options_of_the_attention_go_to_every_stage_that_has_it() -> None:
    model = small(attention={"name": "bi_level_routing", "kv_pooling": "average", "kv_pooling_size": 2})
    mixers = [stage.blocks[0].mixer for stage in model.stages]
    assert {m.pooling for m in mixers} == {("average", 2)}
    assert [(m.topk, m.dense) for m in mixers] == [(1, False), (2, False), (4, False), (1, True)]
    assert model(torch.randn(1, 3, *ODD)).isfinite().all()


def test_drop_path_grows_from_the_first_block_to_the_last() -> None:
    model = small(drop_path_rate=0.4)
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropPath)][::2] == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict"])
def test_released_names_load_without_leftovers(wrap: str) -> None:
    with torch.device("meta"):
        model = backbones.create("biformer_stl")
    state: dict[str, Any] = official("bb_biformer_stl_224")
    if wrap != "plain":
        state = {wrap: {f"module.{key}": value for key, value in state.items()}, "epoch": 300}
    renamed = checkpoint_filter_fn(state, model)
    assert shapes(renamed) == shapes(model.state_dict())
    assert checkpoint_filter_fn(renamed, model) == renamed


def test_released_names_with_channels_first_load_without_leftovers() -> None:
    """Its linear layers are 1 x 1 convolutions, those of the attention by other names."""
    with torch.device("meta"):
        model = backbones.create("biformer_stl_nchw")
    state = {}
    for key, value in official("bb_biformer_stl_224").items():
        if value.dim() == 2 and key != "head.weight":
            value = value[..., None, None]
        state[key.replace("qkv.qkv", "qkv_linear").replace("wo", "output_linear")] = value
    assert shapes(checkpoint_filter_fn(state, model)) == shapes(model.state_dict())


def test_names_of_a_dense_network_load_with_and_without_norms_of_the_levels() -> None:
    with torch.device("meta"):
        normed = backbones.create("biformer_tiny", features_only=True, level_norms=True).model
        plain = backbones.create("biformer_tiny", features_only=True).model
    state = official("bb_biformer_mm_tiny_dense")
    detector = {f"backbone.{key}": value for key, value in state.items()} | {"neck.convs.0.weight": torch.empty(1)}
    assert shapes(checkpoint_filter_fn({"state_dict": detector}, normed)) == shapes(normed.state_dict())
    with pytest.raises(InputError, match="level_norms=true"):
        checkpoint_filter_fn(state, plain)
    without = {key: value for key, value in state.items() if not key.startswith("extra_norms.")}
    for model in (normed, plain):
        assert shapes(checkpoint_filter_fn(without, model)) == shapes(model.state_dict())


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"topk": (1, 2)}, "as many as they are"),
        ({"topk": (1, 2, 5, None)}, "topk=5 must be from 1 to the 4 regions"),
        ({"regions": (2, 2)}, r"regions=\[2, 2\].*4 stages"),
        ({"mlp_ratio": (3, 3)}, r"mlp_ratio=\[3, 3\].*4 stages"),
        ({"layout": "patch"}, "Did you mean 'patches'"),
        ({"form": "legasy"}, "Did you mean 'legacy'"),
        ({"head_dim": 10}, "16 channels are not divisible.*head_dim=10"),
        ({"attention": ["softmax"]}, "4 stages.*the list has 1"),
        ({"attention": "abmil"}, "kind 'pooling'"),
        ({"attention": {"name": "bi_level_routing", "topks": 2}}, "no parameter 'topks'"),
    ],
    ids=str,
)
def test_a_choice_that_cannot_be_is_refused_in_one_sentence(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        small(**params)
    assert "\n" not in str(caught.value)
