"""Other attention in timm's networks: what is kept, what is new, what is seen by whom, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

import backbones
from attention.mixer import Mixer
from backbones import families, swap
from kernels.errors import InputError
from tests.backbones.small import SWIN, TRANSFORMERS, VIT, image, make, of_maps, wake

every_family = pytest.mark.parametrize("name", TRANSFORMERS)
PYRAMIDS = {
    "resnet18": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)},
    "regnetx_002": {},
    "mobilenetv3_small_100": {},
    "efficientnet_b0": {},
}


def mixers(model: nn.Module) -> list[Mixer]:
    return [module for module in model.modules() if isinstance(module, Mixer)]


@every_family
def test_all_other_weights_are_kept_and_the_output_differs(name: str) -> None:
    model = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    total = sum(p.numel() for p in model.parameters())
    x = image(model)
    with torch.no_grad():
        own = model(x)
    change = backbones.replace_attention(model, "window")
    assert not model.training and not any(module.training for module in model.modules())
    wake(model)
    after = model.state_dict()
    replaced = (".attn.", "rel_pos_bias.", "shared_rel_pos.", "rope.")
    others = [key for key in before if not any(part in f".{key}" for part in replaced)]
    assert 0 < len(others) < len(before)
    assert all(torch.equal(before[key], after[key]) for key in others)
    places = TRANSFORMERS[name][2]
    assert change.modules == places == len(mixers(model))
    now = sum(p.numel() for p in model.parameters())
    assert change.kept + change.new == now and change.kept + change.removed == total
    assert str(change).startswith(f"{places} modules put in: {change.kept:,} parameters kept")
    with torch.no_grad():
        swapped = model(x)
        assert swapped.shape == own.shape and swapped.isfinite().all()
        assert (swapped - own).abs().max() > 1e-6
        torch.testing.assert_close(model(x[:1]), swapped[:1], rtol=1e-4, atol=1e-5)


@every_family
def test_everything_learns_and_weights_go_round(name: str) -> None:
    model, other = make(name), make(name)
    for each in (model, other):
        backbones.replace_attention(each, "window")
    other.load_state_dict(model.state_dict())
    x = image(model)
    torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    model.train()
    model(x).square().sum().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None and "head_dist" not in key]


@every_family
def test_stages_are_chosen_one_by_one(name: str) -> None:
    _, stages, _ = TRANSFORMERS[name]
    model = make(name)
    counts = [len(stage.places) for stage in families.stages_of(model)]
    assert len(counts) == stages
    choice: list[Any] = [None] * (stages - 1) + [{"name": "window", "window_size": 3}]
    change = backbones.replace_attention(model, choice)
    assert change.modules == counts[-1]
    assert model(image(model)).isfinite().all()
    backbones.replace_attention(model, "softmax")  # what was replaced can be replaced again
    assert {mixer.name for mixer in mixers(model)} == {"softmax"}
    with pytest.raises(InputError, match=r"one stage, so give one entry|stages, so give one entry or"):
        backbones.replace_attention(model, ["softmax"] * (stages + 1))


@pytest.mark.parametrize("mixer", of_maps("mixer"))
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_every_mixer_fits(name: str, mixer: str) -> None:
    model = backbones.create(name, attention=mixer, **TRANSFORMERS[name][0])
    out = model(image(model))
    assert out.shape == (2, 5) and out.isfinite().all()
    out.sum().backward()


@pytest.mark.parametrize("name", ["gcvit_xxtiny", "volo_d1_224", "poolformer_s12", "caformer_s18", "focalnet_tiny_srf"])
def test_larger_families_find_their_places(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        stages = families.stages_of(model)
        change = backbones.replace_attention(model, "softmax")
        assert len(stages) == 4 and change.modules == sum(len(stage.places) for stage in stages)
        side = model.default_cfg["input_size"][-1]
        assert model(torch.zeros(1, 3, side, side)).shape == (1, 1000)


def test_patch_tokens_do_not_see_the_class_token_and_it_sees_them() -> None:
    model = make("vit_tiny_patch16_224", reg_tokens=2)
    backbones.replace_attention(model, "softmax")
    seen = {}
    model.norm.register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0]))
    x = image(model, 1)
    with torch.no_grad():
        model(x)
        first = seen["tokens"]
        model.cls_token[..., ::2] += 1.0
        model(x)
        second = seen["tokens"]
        torch.testing.assert_close(second[:, 3:], first[:, 3:])
        assert (second[:, 1:3] - first[:, 1:3]).abs().max() > 1e-4  # registers read the class token
        model(x + 1.0)
        assert (seen["tokens"][:, :3] - second[:, :3]).abs().max() > 1e-4
    assert sum("reader" in key for key in model.state_dict()) == 2 * 6


def test_the_patch_grid_follows_the_image() -> None:
    model = make("vit_tiny_patch16_224", dynamic_img_size=True)
    backbones.replace_attention(model, {"name": "window", "window_size": 2})
    shapes: list[tuple[int, ...]] = []
    mixers(model)[0].register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    for height, width in ((32, 32), (24, 48), (48, 24), (32, 32)):
        model(torch.randn(1, 3, height, width))
    assert [shape[1:3] for shape in shapes] == [(4, 4), (3, 6), (6, 3), (4, 4)]


def test_a_vision_transformer_says_what_it_cannot_do_any_more() -> None:
    dropping = make("vit_tiny_patch16_224", patch_drop_rate=0.5)
    backbones.replace_attention(dropping, "softmax")
    with pytest.raises(InputError, match=r"8 patch tokens do not fill the grid of 4 x 4.*patch_drop_rate=0"):
        dropping.train()(image(dropping))
    model = make("vit_tiny_patch16_224")
    backbones.replace_attention(model, "softmax")
    with pytest.raises(InputError, match="no attention mask"):
        model.forward_features(image(model), is_causal=True)


def test_swin_without_windows_sees_the_whole_map() -> None:
    model = make("swin_tiny_patch4_window7_224")
    backbones.replace_attention(model, "softmax")
    x = image(model, 1)
    other = x.clone()
    other[..., -4:, -4:] += 3.0
    block = model.layers[0].blocks[0]
    tokens = [block(model.patch_embed(each)) for each in (x, other)]
    assert (tokens[0][:, 0, 0] - tokens[1][:, 0, 0]).abs().max() > 1e-6
    model.set_input_size((96, 64))
    assert model(torch.randn(1, 3, 96, 64)).isfinite().all()


def test_maxvit_without_partitions_takes_sizes_its_windows_do_not_divide() -> None:
    model = make("maxvit_pico_rw_256")
    backbones.replace_attention(model, "window")
    assert [mixer.shift for mixer in mixers(model)] == [0, 3, 0, 3]  # type: ignore[union-attr]
    assert model(torch.randn(1, 3, 72, 56)).isfinite().all()


def test_checkpoints_of_blocks_and_compilation_give_the_same() -> None:
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        model = make(name)
        backbones.replace_attention(model, "window")
        x = image(model)
        plain = model(x)
        wanted = torch.autograd.grad(plain.square().sum(), list(model.parameters()))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), plain, rtol=1e-4, atol=1e-5)
        model.set_grad_checkpointing()
        found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        torch.testing.assert_close(found, wanted)


@every_family
def test_create_gives_feature_maps(name: str) -> None:
    params = {key: value for key, value in TRANSFORMERS[name][0].items() if key != "num_classes"}
    levels = max(TRANSFORMERS[name][1], 1)
    features = backbones.create(name, features_only=True, out_indices=range(-levels, 0), attention="window", **params)
    assert {mixer.name for mixer in mixers(features)} == {"window"}
    size = params.get("img_size", 64)
    maps = features(torch.randn(2, 3, size, size))
    expected = zip(features.feature_info.channels(), features.feature_info.reduction(), strict=True)
    assert [(m.shape[1], m.shape[2]) for m in maps] == [(dim, size // stride) for dim, stride in expected]


def test_pretrained_weights_are_loaded_before_the_swap(tmp_path: Any) -> None:
    source = make("vit_tiny_patch16_224")
    file = tmp_path / "weights.pth"
    torch.save(source.state_dict(), file)
    overlay = {"file": str(file), "num_classes": 5, "custom_load": False}
    params = VIT | {"pretrained_cfg_overlay": overlay}
    model = backbones.create("vit_tiny_patch16_224", True, attention="softmax", **params)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    features = backbones.create("vit_tiny_patch16_224", True, True, [0, 1], attention="softmax", **params)
    assert torch.equal(features.model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize("name", PYRAMIDS)
def test_gates_follow_the_stages_of_pyramids(name: str) -> None:
    model = timm.create_model(name, num_classes=5, **PYRAMIDS[name]).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        own, (_, plain) = model(x), model.forward_intermediates(x)
    stages = swap.gated_stages(model)
    choice = ["ela" if dim % 16 == 0 else None for _, dim in stages]
    change = backbones.add_gates(model, choice)
    assert change.modules == sum(gate is not None for gate in choice) > 0 and change.removed == 0
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(".gate." in key for key in after.keys() - before.keys())
    with torch.no_grad():
        assert (model(x) - own).abs().max() > 0
        final, maps = model.forward_intermediates(x)
        assert [m.shape for m in maps] == [m.shape for m in plain]
        if choice[-1]:
            assert not torch.equal(maps[-1], plain[-1])
        torch.testing.assert_close(final, model.forward_features(x))
    other = timm.create_model(name, num_classes=5, **PYRAMIDS[name]).eval()
    backbones.add_gates(other, choice)
    other.load_state_dict(after)
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("gate", of_maps("gate"))
def test_every_gate_fits_a_resnet(gate: str) -> None:
    features = backbones.create("resnet18", features_only=True, attention=gate)
    maps = features(torch.randn(2, 3, 65, 50))
    assert [m.shape[1] for m in maps] == [64, 64, 128, 256, 512] and all(m.isfinite().all() for m in maps)
    sum(m.sum() for m in maps).backward()
    truncated = backbones.create("resnet50_clam", attention=[None, None, gate])
    assert truncated(torch.randn(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "choice", "params", "said"),
    [
        ("resnet18", "window", {}, ["mixer attention='window'", "it takes gates: ", "ela", "ViT", "Swin"]),
        ("vit_tiny_patch16_224", "ela", VIT, ["gate attention='ela'", "it takes mixers: ", "softmax", "ResNet"]),
        ("vit_tiny_patch16_224", "abmil", VIT, ["'abmil' is of kind 'pooling'", "ela", "softmax"]),
        ("resnet18", "cross", {}, ["'cross' is of kind 'cross'"]),
        ("mixer_s32_224", "window", {}, ["no token mixer", "ViT"]),
        ("coatnet_pico_rw_224", "window", {}, ["no token mixer"]),
        ("resnet18", ["ela"], {}, ["4 stages", "the list has 1"]),
        ("vit_tiny_patch16_224", ["window", "softmax"], VIT, ["one stage, so give one entry"]),
        ("swin_tiny_patch4_window7_224", [None, None], SWIN, ["without a single name"]),
        ("resnet18", 3, {}, ["attention=3 is not understood"]),
        ("resnet18", {"name": "ela", "variant": "huge"}, {}, ["attention.variant 'huge'"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_what_would(
    name: str, choice: Any, params: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        backbones.create(name, attention=choice, **params)
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_functions_themselves_refuse_too() -> None:
    resnet = timm.create_model("resnet10t")
    with pytest.raises(InputError, match="ResNet has no token mixer"):
        backbones.replace_attention(resnet, "window")
    with pytest.raises(InputError, match="'ela' is of kind 'gate'"):
        backbones.replace_attention(make("vit_tiny_patch16_224"), "ela")
    with pytest.raises(InputError, match=r"VisionTransformer is no convolutional pyramid.*ResNet"):
        backbones.add_gates(make("vit_tiny_patch16_224"), "ela")
    with pytest.raises(InputError, match=r"img_size=\(1, 2, 3\)"):
        backbones.replace_attention(make("vit_tiny_patch16_224"), "window", img_size=(1, 2, 3))


def test_a_network_wrapped_for_its_features_is_changed_inside_or_refused() -> None:
    getter = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **VIT)
    assert backbones.replace_attention(getter, "window").modules == 2 == len(mixers(getter))
    apart = timm.create_model("resnet10t", features_only=True)
    with pytest.raises(InputError, match="taken apart for its feature maps"):
        backbones.add_gates(apart, "ela")


def test_a_refused_choice_leaves_the_network_as_it_was() -> None:
    model = make("swin_tiny_patch4_window7_224")
    keys = list(model.state_dict())
    with pytest.raises(InputError, match="window_size"):
        backbones.replace_attention(model, ["softmax", {"name": "window", "window_size": 0}])
    assert list(model.state_dict()) == keys


def test_half_precision_models_stay_so() -> None:
    model = make("vit_tiny_patch16_224").to(torch.bfloat16)
    backbones.replace_attention(model, "softmax")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(image(model).to(torch.bfloat16)).dtype == torch.bfloat16


def test_tables_are_built_for_the_image_and_a_network_of_any_size_takes_img_size() -> None:
    path = "tests.backbones.test_metaformer:Tables"
    model = backbones.create("pvt_v2_b0", attention=path, img_size=(96, 64), depths=(1, 1, 1, 1))
    assert [m.input_size for m in mixers(model)] == [(24, 16), (12, 8), (6, 4), (3, 2)]  # type: ignore[union-attr]
    vit = backbones.create("vit_tiny_patch16_224", attention=path, **VIT)
    assert {m.input_size for m in mixers(vit)} == {(4, 4)}  # type: ignore[union-attr]
    assert backbones.create("resnet10t", img_size=64)(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
