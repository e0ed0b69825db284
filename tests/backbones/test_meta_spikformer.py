"""Meta-SpikeFormer: timm's conventions, its neurons, time steps and re-parameterised convolutions."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.meta_spikformer import checkpoint_filter_fn, fuse
from backbones.meta_spikformer_blocks import RepConv
from backbones.spiking import LIF, normalise, spike
from kernels.errors import InputError
from tests.backbones.timm_conventions import ODD, Conventions

TINY: dict[str, Any] = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1, 2), "num_heads": 2}


class TestMetaSpikeFormer(Conventions):
    name = "metaspikformer_8_256"
    tiny: ClassVar[dict[str, Any]] = TINY
    strides = (2, 4, 8, 16)


def _lively(model: nn.Module) -> nn.Module:
    """Normalisations that make about half of the neurons fire, so that a test sees spikes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1.5, 2.5)
            nn.init.uniform_(module.bias, 0.5, 1.5)
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.3, 1.0)
    return model.eval()


@pytest.mark.parametrize(("width", "millions"), [(256, 15.1), (384, 31.3), (512, 55.4)])
def test_parameters_are_as_many_as_published(width: int, millions: float) -> None:
    with torch.device("meta"):
        model = backbones.create(f"metaspikformer_8_{width}")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_a_pruned_model_says_how_many_channels_are_left() -> None:
    model = backbones.create("metaspikformer_8_256", time_steps=3, **TINY).eval()
    model.prune_intermediate_layers([1])
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape[1] == model.num_features == 3 * 8


def test_a_neuron_integrates_fires_and_falls_back() -> None:
    inputs = torch.tensor([1.2, 1.2, 1.2, 0.0, 4.0, 0.0])
    # 0.6, 0.9, 1.05 fires; from 0: 0, 2 fires; 0.
    assert LIF(time_steps=6)(inputs).tolist() == [0, 0, 1, 0, 1, 0]
    assert LIF(time_steps=1)(inputs).tolist() == [0, 0, 0, 0, 1, 0]
    assert LIF(time_steps=3, threshold=0.5)(torch.tensor([1.0, 0.9, 1.0])).tolist() == [1, 0, 1]


def test_a_neuron_forgets_between_calls() -> None:
    neuron, x = LIF(time_steps=2), torch.rand(6, 5) * 3
    torch.testing.assert_close(neuron(x), neuron(x))


def test_the_gradient_of_firing_is_that_of_a_sigmoid() -> None:
    membrane = torch.linspace(-1, 3, 41, dtype=torch.float64, requires_grad=True)
    fired = spike(membrane, 1.0)
    assert set(fired.tolist()) == {0.0, 1.0}
    (ours,) = torch.autograd.grad(fired.sum(), membrane)
    (wanted,) = torch.autograd.grad(torch.sigmoid(4 * (membrane - 1)).sum(), membrane)
    torch.testing.assert_close(ours, wanted)


def test_no_gradient_passes_through_the_reset() -> None:
    x = torch.tensor([3.0, 0.4], dtype=torch.float64, requires_grad=True)
    LIF(time_steps=2)(x)[1].backward()
    # The first step fires: its membrane is multiplied by 0, and that factor is taken for a constant.
    assert x.grad is not None and x.grad[0] == 0 and x.grad[1] > 0


@pytest.mark.parametrize("size", [(33, 32), (75, 93)])
@pytest.mark.parametrize("time_steps", [1, 2])
def test_gradients_stay_ordinary_where_attention_is_silent(size: tuple[int, int], time_steps: int) -> None:
    torch.manual_seed(0)
    deep = {**TINY, "depths": (1, 1, 2, 6, 2)}
    model = backbones.create("metaspikformer_8_256", features_only=True, time_steps=time_steps, **deep).train()
    fired: list[float] = []
    for name, module in model.named_modules():
        if name.endswith("lif_out"):
            module.register_forward_hook(lambda _m, _x, y: fired.append(float(y.detach().sum())))
    sum((features * torch.randn_like(features)).mean() for features in model(torch.randn(2, 3, *size))).backward()
    assert len(fired) == 8 and min(fired) == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert 1e-4 < max(float(g.abs().max()) for g in gradients) < 1e2


def test_a_channel_that_varies_has_the_gradient_of_batch_normalisation() -> None:
    norm = nn.BatchNorm2d(3).double()
    x = torch.zeros(4, 3, 25, 25, dtype=torch.float64)
    x[0, 0, 0, 0] = 0.04  # one weak spike, in 2500 places
    x[:, 1] = torch.randn(4, 25, 25)
    x.requires_grad_()
    wanted, above = norm(x), torch.randn(4, 3, 25, 25, dtype=torch.float64)
    ours = normalise(norm, x)
    torch.testing.assert_close(ours, wanted)
    gradient, expected = (torch.autograd.grad((y * above).sum(), x)[0] for y in (ours, wanted))
    torch.testing.assert_close(gradient[:, 1], expected[:, 1])
    torch.testing.assert_close(gradient[:, 0], expected[:, 0])
    # The third is constant: as if its variance were 1.
    torch.testing.assert_close(gradient[:, 2], above[:, 2] - above[:, 2].mean())
    norm.eval()
    torch.testing.assert_close(normalise(norm, x), norm(x))


def test_only_spikes_reach_the_convolutions() -> None:
    model = _lively(backbones.create("metaspikformer_8_256", time_steps=2, **TINY))
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        convolves_spikes = name.endswith(("fc1", "fc2", "pwconv1", "dwconv", "sep", "conv")) and name != "stem.conv"
        if isinstance(module, nn.Conv2d) and convolves_spikes:
            module.register_forward_hook(lambda _m, inputs, _y, name=name: seen.__setitem__(name, inputs[0]))
    with torch.no_grad():
        model(torch.randn(2, 3, *ODD))
    assert len(seen) > 15
    assert [name for name, x in seen.items() if not set(x.unique().tolist()) <= {0.0, 1.0}] == []
    assert 0.05 < torch.cat([x.flatten() for x in seen.values()]).mean() < 0.95


@pytest.mark.parametrize("time_steps", [1, 3])
def test_images_of_a_batch_do_not_see_each_other(time_steps: int) -> None:
    model = _lively(backbones.create("metaspikformer_8_256", time_steps=time_steps, num_classes=5, **TINY).double())
    x = torch.randn(3, 3, *ODD, dtype=torch.float64)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (3, time_steps * 16, 5, 7)
        torch.testing.assert_close(features, torch.cat([model.forward_features(image[None]) for image in x]))
        assert not torch.allclose(features[0], features[1])


def test_more_time_steps_are_another_answer_of_the_same_weights() -> None:
    once = _lively(backbones.create("metaspikformer_8_256", num_classes=5, **TINY))
    often = backbones.create("metaspikformer_8_256", num_classes=5, time_steps=4, **TINY).eval()
    often.load_state_dict(once.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        first, *_, last = often.forward_features(x).chunk(4, dim=1)
        torch.testing.assert_close(first, once.forward_features(x))
        assert not torch.allclose(first, last)
        # The pooled features are rates of 0, 1/4, ... 1.
        rates = often.forward_head(often.forward_features(x), pre_logits=True)
        torch.testing.assert_close((rates * 4).round() / 4, rates)


def test_a_convolution_in_three_steps_is_one_convolution() -> None:
    module = _lively(RepConv(6)).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(module.fused()(x), module(x))


def test_a_fused_model_gives_the_same_answer_with_fewer_layers() -> None:
    model = _lively(backbones.create("metaspikformer_8_256", num_classes=5, **TINY).double())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        fuse(model)
        torch.testing.assert_close(model(x), before)
    assert not any(isinstance(module, RepConv) for module in model.modules())


def test_another_mixer_takes_the_place_of_spike_attention() -> None:
    for chosen in ("window", {"name": "softmax", "num_heads": 4}, [None, "window"]):
        model = backbones.create("metaspikformer_8_256", attention=chosen, img_size=64, num_classes=5, **TINY).eval()
        assert model(torch.randn(1, 3, *ODD)).shape == (1, 5)
        named = {type(m).__name__ for m in model.modules()}
        assert "OtherMixer" in named and ("SpikeAttention" in named) == isinstance(chosen, list)


def test_a_distilled_model_answers_twice_in_training_and_once_after() -> None:
    model = backbones.create("metaspikformer_8_256", distilled=True, num_classes=5, **TINY)
    x = torch.randn(2, 3, 64, 64)
    assert [y.shape for y in model(x)] == [(2, 5), (2, 5)]
    model.eval()
    rates = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), (model.head(rates) + model.head_dist(rates)) / 2)


@pytest.mark.parametrize(
    ("official", "ours"),
    [
        ("downsample1_1.encode_conv.weight", "stem.conv.weight"),
        ("downsample4.encode_bn.running_mean", "stages.4.downsample.bn.running_mean"),
        ("ConvBlock1_2.0.Conv.dwconv.weight", "stages.1.blocks.0.sep.dwconv.weight"),
        ("ConvBlock2_2.0.bn2.bias", "stages.2.blocks.1.bn2.bias"),
        ("block3.0.attn.k_conv.0.body.1.bn.weight", "stages.3.blocks.0.attn.k.bn1.weight"),
        ("block3.0.attn.k_conv.0.body.2.1.weight", "stages.3.blocks.0.attn.k.conv2.weight"),
        ("block4.1.attn.proj_conv.1.bias", "stages.4.blocks.1.attn.proj.bn.bias"),
        ("block4.1.mlp.fc2_bn.weight", "stages.4.blocks.1.mlp.bn2.weight"),
        ("head.weight", "head.weight"),
    ],
)
def test_released_names_become_ours(official: str, ours: str) -> None:
    model = backbones.create("metaspikformer_8_256", **TINY)
    state = {"downsample1_1.encode_conv.weight": torch.zeros(1), official: torch.zeros(1)}
    renamed = checkpoint_filter_fn({"model": {f"module.{k}": v for k, v in state.items()}}, model)
    assert ours in renamed and ours in model.state_dict()
    assert checkpoint_filter_fn(renamed, model).keys() == renamed.keys()


def test_weights_of_tokens_in_a_row_become_those_of_a_map() -> None:
    state = {"downsample1_1.encode_conv.weight": torch.zeros(1), "block3.0.mlp.fc1_conv.weight": torch.zeros(64, 16, 1)}
    renamed = checkpoint_filter_fn(state, nn.Identity())
    assert renamed["stages.3.blocks.0.mlp.fc1.weight"].shape == (64, 16, 1, 1)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"dims": (7, 8, 16, 16)}, "first of them even"),
        ({"depths": (1, 1, 2, 6)}, "five positive"),
        ({"num_heads": 3}, "num_heads=3 must divide"),
        ({"attention": ["window"]}, "the two stages"),
        ({"attention": {"window_size": 7}}, "names no mixer"),
        ({"attention": "windw"}, "window"),
        ({"time_steps": 0}, "time_steps=0"),
        ({"global_pool": ""}, "num_classes=0"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_in_one_sentence(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        backbones.create("metaspikformer_8_256", **{**TINY, **params})
