"""OverLoCK: timm's conventions, its auxiliary, dense and merged forms, chosen mixers, and its released weights."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import timm
import torch
from hydra import compose, initialize_config_module
from timm.utils.model import reparameterize_model
from torch import nn

import backbones
from backbones.checkpoints import load
from backbones.overlock import OverLoCK, auxiliary_loss, checkpoint_filter_fn
from backbones.overlock_blocks import ContextMixer, FocusBlock
from kernels.errors import InputError
from tests.backbones.timm_conventions import ODD, Conventions
from tests.parity.recipe import about

TINY: dict[str, Any] = {
    "depths": (1, 1, 1, 1),
    "focus_depths": (2, 1),
    "dims": (8, 16, 24, 32),
    "kernel_sizes": (9, 7, 7, 5),
    "num_heads": (1, 2),
    "mlp_ratios": (2, 2, 2, 2),
    "focus_mlp_ratios": (2, 2),
    "head_width": 24,
}
VARIANTS = ("overlock_xtiny", "overlock_tiny", "overlock_small", "overlock_base")


def tiny(**params: Any) -> OverLoCK:
    """A small network whose norms and tables have been given values that count."""
    model = backbones.create("overlock_xtiny", **{**TINY, "num_classes": 7, **params})
    assert isinstance(model, OverLoCK)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma", "beta", "rpb1", "rpb2")):
                parameter.normal_(std=0.3)
            elif parameter.ndim == 4 and parameter.shape[1] > 1:
                parameter.mul_(5)  # at the start's 0.02 the branches hardly show
    return model.eval()


class TestOverLoCK(Conventions):
    name = "overlock_xtiny"
    tiny: ClassVar[dict[str, Any]] = {**TINY, "focus_depths": (1, 1)}

    @torch.no_grad()
    def test_the_published_size_gives_logits(self) -> None:
        model = backbones.create(self.name).eval()
        height, width = model.pretrained_cfg["input_size"][1:]
        maps: list[tuple[int, ...]] = []
        for block in (model.focus[0].blocks[0], model.focus[1].blocks[0]):
            block.mixer.weight_query.register_forward_hook(lambda _, __, y: maps.append(tuple(y.shape[2:])))
        assert model(torch.randn(1, 3, height, width)).shape == (1, 1000)
        assert maps == [(14, 14), (7, 7)]  # just large enough for kernels of 13 and 7: nothing is resized


@pytest.mark.parametrize(
    ("name", "trained", "merged"),
    [
        ("overlock_xtiny", 17_307_272, 16.45),
        ("overlock_tiny", 34.99, 33.47),
        ("overlock_small", 58.31, 56.16),
        ("overlock_base", 98.01, 94.94),
    ],
)
def test_parameters_are_as_many_as_published(name: str, trained: float, merged: float) -> None:
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in backbones.create(name, **form).parameters())
            for form in ({"aux_head": True}, {"merged": True})
        ]
    assert trained in (counts[0], round(counts[0] / 1e6, 2))
    assert round(counts[1] / 1e6, 2) == merged


@pytest.mark.parametrize("name", VARIANTS)
def test_each_configuration_names_a_variant(name: str) -> None:
    with initialize_config_module("conf", version_base=None):
        cfg = compose(overrides=[f"+backbone={name}"]).backbone
    assert dict(cfg) == {"name": name, "pretrained": False, "checkpoint": None, "params": {}}
    assert timm.is_model(name) and timm.get_pretrained_cfg(name).license == "apache-2.0"


@torch.no_grad()
def test_maps_smaller_than_the_kernels_are_mixed_at_the_kernels_size() -> None:
    mixer = ContextMixer(16, 8, num_heads=2, kernel_size=7, smk_size=5).eval()
    nn.init.normal_(mixer.rpb2)
    mixed: list[tuple[int, ...]] = []
    mixer.weight_query.register_forward_hook(lambda _, __, y: mixed.append(tuple(y.shape[2:])))
    for size, wanted in (((5, 8), (7, 11)), ((4, 4), (7, 7)), ((9, 7), (9, 7)), ((1, 3), (7, 21))):
        # Weights sum to one, and neither resizing nor averaging changes what is the same everywhere.
        values = torch.randn(1, 16, 1, 1).expand(1, 16, *size)
        torch.testing.assert_close(mixer(values, torch.randn(1, 24, *size)), values, rtol=1e-5, atol=1e-5)
        assert mixed[-1] == wanted


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (40, 33), (1, 70)])
def test_very_small_images_have_a_pyramid_too(size: tuple[int, int]) -> None:
    maps = tiny().forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
    assert [tuple(y.shape[2:]) for y in maps] == [tuple(-(-n // s) for n in size) for s in (4, 8, 16, 32)]
    assert all(y.isfinite().all() for y in maps)


@torch.no_grad()
def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    model, x = tiny(), torch.randn(3, 3, *ODD)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_overview_guides_every_focus_block() -> None:
    model, x = tiny(), torch.randn(1, 3, 64, 64)
    before = model.forward_intermediates(x, intermediates_only=True)
    model.context.bias.add_(torch.randn(8))
    after = model.forward_intermediates(x, intermediates_only=True)
    assert [bool(torch.equal(old, new)) for old, new in zip(before, after, strict=True)] == [True, True, False, False]
    reminded = [block.h_scale is not None for stage in model.focus for block in stage.blocks]
    assert reminded == [False, True, True]
    seen = {id(block): [] for stage in model.focus for block in stage.blocks}
    for stage in model.focus:
        for block in stage.blocks:
            block.register_forward_pre_hook(lambda module, args: seen[id(module)].append(args[1]))
    model(x)
    first, second, third = (guides[0] for guides in seen.values())
    assert first is second and third.shape[2:] == (2, 2)
    torch.testing.assert_close(third, model.context(model._maps(x)[1]))


def test_training_answers_twice_with_an_auxiliary_head_and_once_without() -> None:
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([0, 3])
    model = tiny(aux_head=True)
    assert model(x).shape == (2, 7)
    logits, overview = model.train()(x)
    assert logits.shape == overview.shape == (2, 7)
    cross_entropy = nn.CrossEntropyLoss()
    expected = cross_entropy(logits, target) + 0.4 * cross_entropy(overview, target)
    loss = auxiliary_loss((logits, overview), target)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    torch.testing.assert_close(auxiliary_loss(logits, target), cross_entropy(logits, target))
    model.reset_classifier(5)
    assert [y.shape for y in model(x)] == [(2, 5), (2, 5)]
    model.reset_classifier(0)
    assert model(x).shape == (2, 24) and model.aux_head is None
    model.reset_classifier(3)
    assert len(model(x)) == 2
    assert tiny().train()(x).shape == (2, 7)


@torch.no_grad()
def test_the_merged_form_computes_the_same_with_fewer_parameters() -> None:
    model, x = tiny(), torch.randn(2, 3, *ODD)
    wanted, count, trained = model(x), sum(p.numel() for p in model.parameters()), model.state_dict()
    by_timm = reparameterize_model(model)
    torch.testing.assert_close(by_timm(x), wanted, rtol=1e-4, atol=1e-4)
    assert model.merge() is model
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) < count
    assert by_timm.state_dict().keys() == model.state_dict().keys()
    fresh = tiny(merged=True)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), wanted, rtol=1e-4, atol=1e-4)
    other = tiny(merged=True)
    other.load_state_dict(checkpoint_filter_fn(trained, other))
    torch.testing.assert_close(other(x), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="merged=true"):
        checkpoint_filter_fn(model.state_dict(), tiny())


def test_drop_path_rises_over_base_and_focus_blocks() -> None:
    model = tiny(drop_path_rate=0.6)
    rates = [module.drop_path.drop_prob for module in model.modules() if hasattr(module, "drop_path")]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("dense", ["segmentation", "detection"])
def test_dense_forms_normalise_every_level(dense: str) -> None:
    model = backbones.create("overlock_xtiny", **TINY, features_only=True, dense=dense).eval()
    maps = model(torch.randn(1, 3, *ODD))
    assert [y.shape[1] for y in maps] == [8, 16, 32, 40] == model.feature_info.channels()
    for y in maps:
        torch.testing.assert_close(y.mean(1), torch.zeros_like(y.mean(1)), rtol=0, atol=1e-4)
    norms = [name for name, _ in model.named_parameters() if "dense.norms" in name]
    assert len(norms) == 8
    assert any("dense.overview" in name for name, _ in model.named_parameters()) == (dense == "detection")


@torch.no_grad()
@pytest.mark.parametrize("levels", [(0,), (1,), (0, 2), (3,)])
def test_a_dense_form_keeps_only_what_the_levels_asked_for_need(levels: tuple[int, ...]) -> None:
    whole, x = tiny(dense="detection"), torch.randn(1, 3, *ODD)
    wanted = whole.forward_intermediates(x, indices=levels, intermediates_only=True)
    part = backbones.create("overlock_xtiny", **TINY, features_only=True, dense="detection", out_indices=levels).eval()
    load(part, whole.state_dict(), "overlock_xtiny", "this test")
    for ours, theirs in zip(part(x), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("levels", [(0, 1, 2, 3), (0, 2), (1,)])
def test_every_parameter_of_a_pyramid_gets_a_gradient(levels: tuple[int, ...]) -> None:
    model = backbones.create("overlock_xtiny", **TINY, features_only=True, dense="detection", out_indices=levels)
    sum(y.pow(3).sum() for y in model(torch.randn(2, 3, 64, 64))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("softmax", ["softmax", "softmax"]),
        ([None, {"name": "window", "window_size": 3}], [None, "window"]),
        (["contmix", None], ["contmix", None]),
    ],
)
def test_focus_stages_take_other_mixers(choice: Any, names: list[str | None]) -> None:
    model = tiny(attention=choice, img_size=ODD, kernel_sizes=(9, 7, 7, 7))
    found = [getattr(getattr(stage.blocks[0].mixer, "mixer", None), "name", None) for stage in model.focus]
    assert found == names
    model.train()(torch.randn(2, 3, *ODD)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_mixers_of_a_stage_may_alternate() -> None:
    model = tiny(attention="window", focus_depths=(2, 1))
    assert [block.mixer.mixer.shift for block in model.focus[0].blocks] == [0, 3]


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_released_names_load_without_leftovers(prefix: str) -> None:
    shapes = about("bb_overlock_xt_224")["state_shapes"]
    with torch.device("meta"):
        models = [backbones.create("overlock_xtiny", **form) for form in ({"aux_head": True}, {})]
        released = {f"{prefix}{key}": torch.empty(shape) for key, shape in shapes.items()}
        for model in models:
            renamed = checkpoint_filter_fn({"model": released}, model)
            own = {k: v.shape for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
            assert {k: v.shape for k, v in renamed.items()} == own
            assert checkpoint_filter_fn(renamed, model).keys() == renamed.keys()


def test_weights_of_the_classifier_go_into_a_dense_form_and_into_other_classes() -> None:
    trained, x = tiny(aux_head=True), torch.randn(1, 3, *ODD)
    dense = backbones.create("overlock_xtiny", **TINY, features_only=True, dense="segmentation").eval()
    load(dense, trained.state_dict(), "overlock_xtiny", "this test")
    with torch.no_grad():
        first = trained.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
        normed = nn.functional.layer_norm(first.movedim(1, -1), (8,), eps=1e-6).movedim(-1, 1)
        torch.testing.assert_close(dense(x)[0], normed)
    whole = tiny(dense="segmentation")
    filtered = checkpoint_filter_fn(trained.state_dict(), whole)
    assert filtered.keys() == whole.state_dict().keys()
    other = tiny(aux_head=True, num_classes=3)
    assert "aux_head.fc.weight" not in checkpoint_filter_fn(trained.state_dict(), other)


def test_layers_are_grouped_in_the_order_of_the_network() -> None:
    from timm.optim._param_groups import group_parameters

    layers = group_parameters(tiny(), tiny().group_matcher(), reverse=True)
    order = ["stem.0.weight", "base.0.blocks.0.ls", "base.2.downsample.0.weight", "overview.blocks.0.ls.weight"]
    order += [
        "focus.0.blocks.0.dwconv1.weight",
        "focus.0.blocks.1.dwconv1.weight",
        "focus.1.downsample.x_proj.0.weight",
    ]
    numbers = [layers[name] for name in order if name in layers]
    assert numbers == sorted(set(numbers)) and layers["context.weight"] == layers["overview.blocks.0.ls.weight"]
    assert {"focus.0.blocks.0.mixer.rpb1", "focus.0.blocks.0.mixer.rpb2"} <= tiny().no_weight_decay()


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"dims": (8, 16, 24)}, r"dims=\[8, 16, 24\] needs 4 positive entries"),
        ({"focus_depths": (2, 0)}, r"focus_depths=\[2, 0\] needs 2 positive"),
        ({"layer_scale": (1, 1)}, r"layer_scale=\[1, 1\] needs 4"),
        ({"num_heads": (5, 2)}, "got 24 with num_heads=5"),
        ({"smk_size": 9}, "smk_size=9 must be from 1 to"),
        ({"kernel_sizes": (9, 7, 7, 6)}, "has a side of 5, 7.* got 6"),
        ({"dense": "detect"}, "Did you mean 'detection'"),
        ({"global_pool": ""}, "num_classes=0"),
        ({"attention": "abmil"}, "of kind 'pooling'"),
        ({"attention": ["softmax"]}, "has 2 stages, so give one entry or 2"),
        ({"attention": "softmax", "img_size": (64, 64, 64)}, r"img_size=\(64, 64, 64\)"),
    ],
)
def test_what_is_impossible_is_said_in_one_sentence(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        tiny(**params)
    assert "\n" not in str(caught.value)


def test_a_focus_block_without_layer_scale_adds_its_branches() -> None:
    model = tiny(layer_scale=(None, None, None, None))
    blocks = [module for module in model.modules() if isinstance(module, FocusBlock)]
    assert all(isinstance(block.ls1, nn.Identity) for block in blocks)
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()
