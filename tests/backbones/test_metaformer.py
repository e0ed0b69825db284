"""The pyramid of any mixer: timm's contract, every mixer and gate, sizes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.optim._param_groups import group_parameters
from torch import Tensor, nn

import attention
import backbones
from attention.mixer import Mixer
from backbones.blocks import MixerBlock
from backbones.metaformer import MetaFormer
from kernels.errors import InputError
from tests.backbones.small import HOST, make, of_maps

SIZES = [(64, 64), (70, 45), (33, 97)]


def small(**params: Any) -> MetaFormer:
    model = make("metaformer_tiny", **params)
    assert isinstance(model, MetaFormer)
    return model


def images(height: int = 70, width: int = 45, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width)


def steps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of every parameter after one training step."""
    model.train().zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "millions"), [("metaformer_tiny", 16.7), ("metaformer_small", 35.1), ("metaformer_base", 59.7)]
)
def test_the_sizes_are_those_of_the_table(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = backbones.create(name)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count, 1) == millions
    assert model.default_cfg["first_conv"] + ".weight" in model.state_dict()
    assert model.default_cfg["classifier"] + ".weight" in model.state_dict()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_maps_of_any_image_have_ceil_of_size_over_stride(height: int, width: int) -> None:
    model = small()
    features = make("metaformer_tiny", features_only=True)
    assert features.feature_info.channels() == [32, 64, 64, 64]
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    x = images(height, width)
    for found, dim, stride in zip(features(x), (32, 64, 64, 64), (4, 8, 16, 32), strict=True):
        assert found.shape == (2, dim, -(-height // stride), -(-width // stride)) and found.is_contiguous()
    assert model(x).shape == (2, 5) and model.forward_features(x).shape[2:] == found.shape[2:]


@torch.no_grad()
def test_intermediates_end_in_the_features() -> None:
    model, x = small(), images()
    final, maps = model.forward_intermediates(x)
    assert len(maps) == 4
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(model.forward_intermediates(x, norm=True)[1][-1], final)
    early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, maps[:2])
    with pytest.raises(InputError, match="NHWC"):
        model.forward_intermediates(x, output_fmt="NHWC")
    assert model.prune_intermediate_layers([0, 2]) == [0, 2] and len(model.stages) == 3
    torch.testing.assert_close(model.forward_intermediates(x, [0, 2], intermediates_only=True), [maps[0], maps[2]])


def test_the_head_is_timms() -> None:
    model, x = small(), images(batch=1)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (1, model.head_hidden_size)
    assert model.get_classifier() is model.head.fc
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == (1, model.num_features, 3, 2)
    model.reset_classifier(7, "max")
    assert model(x).shape == (1, 7)
    assert small(in_chans=1, num_classes=0)(torch.randn(1, 1, 32, 32)).shape == (1, 64)


def test_every_parameter_learns_and_checkpoints_of_blocks_change_nothing() -> None:
    model, x = small(gate="ela", layer_scale=0.5), images()
    plain = steps(model, x)
    assert plain.keys() == dict(model.named_parameters()).keys()
    model.set_grad_checkpointing()
    for name, gradient in steps(model, x).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_weights_go_round_and_layers_are_grouped() -> None:
    model, other, x = small(gate="ela"), small(gate="ela"), images()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    assert {"stages.0.blocks.0.mixer.relative_position_bias_table"} <= model.no_weight_decay()
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers.keys() == dict(model.named_parameters()).keys()
    order = ["stem.conv1.weight", "stages.0.blocks.0.norm1.weight", "stages.3.blocks.0.norm1.weight", "norm.weight"]
    numbers = [layers[name] for name in [*order, "head.fc.weight"]]
    assert numbers == sorted(numbers) and numbers[0] == 0 and len(set(numbers[:3])) == 3
    group_parameters(model, model.group_matcher(coarse=True), reverse=True)


def test_drop_path_grows_with_depth_and_vanishes_in_evaluation() -> None:
    model, x = small(drop_path_rate=0.3), images()
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks(model)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    torch.testing.assert_close(model(x), model(x))
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)


def test_it_compiles_without_a_break() -> None:
    model, x = small(), images(batch=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", of_maps("mixer"))
def test_every_mixer_trains_in_every_stage(name: str) -> None:
    model = make("metaformer_tiny", attention=name, img_size=(45, 38))
    x = images(45, 38)
    assert {block.mixer.name for block in blocks(model)} == {name}
    gradients = steps(model, x)
    assert gradients and all(g.isfinite().all() for g in gradients.values())
    model.eval()
    assert model(images(64, 40, 1)).isfinite().all()  # another size than the one it was built for


@pytest.mark.parametrize("name", of_maps("gate"))
def test_every_gate_follows_every_stage(name: str) -> None:
    model = backbones.create("metaformer_tiny", gate=name, **HOST)
    assert {stage.gate.name for stage in model.stages} == {name}
    alike = backbones.create("metaformer_tiny", attention=name, **HOST)
    if "mixer" not in attention.kinds_of(name):  # where a name is both, attention= is the mixer
        assert alike.state_dict().keys() == model.state_dict().keys()
    gradients = steps(model, images(45, 38))
    assert gradients and all(g.isfinite().all() for g in gradients.values())


def test_each_stage_may_have_its_own() -> None:
    mixers = ["softmax", {"name": "window", "window_size": 3}, None, None]
    model = small(attention=mixers, gate=[None, "ela", None, "ela"])
    assert [block.mixer.name for block in blocks(model)] == ["softmax", "window", "softmax", "softmax"]
    assert blocks(model)[1].mixer.window_size == (3, 3)
    assert [type(stage.gate).__name__ for stage in model.stages][::2] == ["Identity", "Identity"]
    defaults = [block.mixer.name for block in blocks(small())]
    assert defaults == ["window", "window", "softmax", "softmax"]


def test_windows_alternate_within_a_stage_and_parameters_reach_the_mixer() -> None:
    model = small(depths=(3, 1, 1, 1), attention="window")
    assert [block.mixer.shift for block in blocks(model)] == [0, 3, 0, 0, 0, 0]
    still = small(depths=(3, 1, 1, 1), attention={"name": "window", "window_size": 5, "shift": 0, "num_heads": 8})
    assert {(block.mixer.shift, block.mixer.window_size, block.mixer.num_heads) for block in blocks(still)} == {
        (0, (5, 5), 8)
    }
    assert [block.mixer.num_heads for block in blocks(small(head_dim=16))] == [2, 4, 4, 4]


class Tables(Mixer):
    """Takes the size of its map, as mixers with tables do."""

    kind = "mixer"
    name = "tables"

    def __init__(self, dim: int, num_heads: int, input_size: tuple[int, int] = (7, 7)) -> None:
        super().__init__(dim, num_heads)
        self.input_size = input_size

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        return x.mean((1, 2), keepdim=True).expand_as(x)


def test_a_class_of_your_own_learns_the_size_of_each_stages_map() -> None:
    path = "tests.backbones.test_metaformer:Tables"
    expected = [(18, 12), (9, 6), (5, 3), (3, 2)]
    for choice in (path, Tables, {"name": path}):
        model = small(attention=choice, img_size=(70, 45))
        assert [block.mixer.input_size for block in blocks(model)] == expected
    fixed = small(attention={"name": path, "input_size": (2, 2)})
    assert {block.mixer.input_size for block in blocks(fixed)} == {(2, 2)}


def test_the_position_convolution_can_be_left_out() -> None:
    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    x = torch.randn(1, 4, 5, 8)
    assert MixerBlock(8, Shift(), position=False).position is None
    with_positions = MixerBlock(8, Shift())
    assert with_positions(x).shape == x.shape and with_positions.position is not None


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"attention": "abmil"}, ["'abmil' is of kind 'pooling'", "softmax"]),
        ({"attention": "cross"}, ["'cross' is of kind 'cross'", "window"]),
        ({"gate": "window"}, ["'window' is of kind 'mixer'", "ela"]),
        ({"attention": "windw"}, ["Did you mean 'window'"]),
        ({"attention": ["window", "window"]}, ["4 stages", "the list has 2"]),
        ({"gate": ["ela"]}, ["4 stages", "the list has 1"]),
        ({"attention": {"name": "window", "windowsize": 3}}, ["no parameter 'windowsize'", "window_size"]),
        ({"attention": {"window_size": 3}}, ["is not understood", "a mapping with 'name'"]),
        ({"attention": ["window", "ela", None, None]}, ["mixes kinds", "window (mixer)", "ela (gate)"]),
        ({"attention": "ela", "gate": "ela"}, ["gates twice"]),
        ({"depths": (1, 1)}, ["depths=[1, 1]", "as many as each other"]),
        ({"dims": (32, 64, 64, 40)}, ["40 channels", "head_dim=32"]),
        ({"img_size": (64, 64, 64)}, ["img_size=(64, 64, 64)", "(height, width)"]),
        ({"img_size": 0}, ["img_size=0"]),
    ],
    ids=str,
)
def test_what_is_impossible_is_said_in_one_sentence(params: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        backbones.create("metaformer_tiny", **HOST | params)
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert "\n" not in str(caught.value)


def blocks(model: Any) -> list[Any]:
    return [block for stage in model.stages for block in stage.blocks]


def test_it_encodes_tiles() -> None:
    params = HOST | {"num_classes": 0, "attention": "ela", "img_size": 64}
    encoder = backbones.create_encoder("metaformer_tiny", params=params)
    features = encoder(torch.randint(0, 255, (3, 3, 80, 80), dtype=torch.uint8))
    assert features.shape == (3, 64) and features.isfinite().all() and features.std(0).min() > 0


def test_device_and_dtype_pass_through() -> None:
    model = timm.create_model("metaformer_tiny", device="cpu", dtype=torch.float64, **HOST)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.reset_classifier(3)
    assert model(images().double()).dtype == torch.float64


def test_timm_builds_it_by_name_too() -> None:
    build: Callable[..., nn.Module] = timm.create_model
    assert isinstance(build("metaformer_tiny", attention="softmax", **HOST), MetaFormer)
