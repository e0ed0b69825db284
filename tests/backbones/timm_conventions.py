"""What every model of ours that is registered with timm keeps to, as a class of tests to inherit from."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import timm
import torch
from hydra import compose, initialize_config_module
from timm.models._manipulate import group_parameters
from torch import Tensor, nn

import backbones
from kernels.errors import InputError

ODD = (75, 106)


class Conventions:
    """Set ``name``, the parameters of a tiny variant, and what differs; every test builds the tiny variant."""

    name: ClassVar[str]
    tiny: ClassVar[Mapping[str, Any]]
    strides: ClassVar[tuple[int, ...]] = (4, 8, 16, 32)

    def build(self, **params: Any) -> nn.Module:
        return backbones.create(self.name, **{**self.tiny, "num_classes": 7, **params})

    def loss(self, model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum()

    def test_any_image_size_gives_maps_of_the_strides_and_widths_promised(self) -> None:
        model = self.build(features_only=True).eval()
        assert tuple(model.feature_info.reduction()) == self.strides
        for size in (ODD, (64, 64)):
            maps = model(torch.randn(1, 3, *size))
            shapes = [tuple(y.shape[1:]) for y in maps]
            wanted = [
                (width, *(math.ceil(n / stride) for n in size))
                for width, stride in zip(model.feature_info.channels(), self.strides, strict=True)
            ]
            assert shapes == wanted
            assert all(y.is_contiguous() and y.isfinite().all() for y in maps)

    def test_the_published_size_gives_logits(self) -> None:
        with torch.device("meta"):
            model = backbones.create(self.name).eval()
            height, width = model.pretrained_cfg["input_size"][1:]
            assert model(torch.empty(2, 3, height, width)).shape == (2, 1000)
            assert model.forward_features(torch.empty(2, 3, height, width)).shape[1] == model.num_features

    def test_intermediates_end_in_the_features(self) -> None:
        model, x = self.build().eval(), torch.randn(2, 3, *ODD)
        with torch.no_grad():
            final, maps = model.forward_intermediates(x)
            torch.testing.assert_close(final, model.forward_features(x))
            torch.testing.assert_close(model.forward_head(final), model(x))
            some = model.forward_intermediates(x, indices=[0, 2], stop_early=True, intermediates_only=True)
        for ours, wanted in zip(some, (maps[0], maps[2]), strict=True):
            torch.testing.assert_close(ours, wanted)
        assert [y.shape[1] for y in maps] == [info["num_chs"] for info in model.feature_info]
        with pytest.raises(InputError, match="NHWC"):
            model.forward_intermediates(x, output_fmt="NHWC")

    def test_a_pruned_model_gives_the_same_maps_with_fewer_parameters(self) -> None:
        model, x = self.build().eval(), torch.randn(1, 3, *ODD)
        before = sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            wanted = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
            assert model.prune_intermediate_layers([0, 1]) == [0, 1]
            got = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert sum(p.numel() for p in model.parameters()) < before

    def test_the_classifier_can_be_replaced_and_removed(self) -> None:
        model, x = self.build().eval(), torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            pooled = model.forward_head(model.forward_features(x), pre_logits=True)
            assert pooled.shape == (1, model.head_hidden_size)
            model.reset_classifier(5)
            assert model(x).shape == (1, 5) and model.num_classes == 5
            model.reset_classifier(0)
            torch.testing.assert_close(model(x), pooled)
            model.reset_classifier(0, "")
            assert model(x).shape[1] == model.num_features and model(x).ndim == 4
            model.reset_classifier(3, "avg")
            assert model(x).shape == (1, 3)
            assert self.build(num_classes=0).eval()(x).shape == (1, model.head_hidden_size)

    def test_first_convolution_and_classifier_are_where_the_description_says(self) -> None:
        model = self.build(in_chans=1)
        state, cfg = model.state_dict(), model.default_cfg
        assert state[f"{cfg['first_conv']}.weight"].shape[1] == 1 == model.in_chans
        classifiers = cfg["classifier"] if isinstance(cfg["classifier"], tuple) else (cfg["classifier"],)
        assert all(f"{name}.weight" in state for name in classifiers)
        assert model.get_classifier() is model.get_submodule(classifiers[0])
        assert model(torch.randn(2, 1, 64, 64)).shape == (2, 7)

    def test_every_parameter_gets_a_gradient(self) -> None:
        model = self.build()
        self.loss(model, torch.randn(2, 3, 64, 64)).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

    def test_weights_survive_the_way_to_another_model(self) -> None:
        first, second, x = self.build().eval(), self.build().eval(), torch.randn(1, 3, 64, 64)
        second.load_state_dict(first.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(first(x), second(x))

    def test_checkpointing_changes_nothing(self) -> None:
        model, x = self.build().eval(), torch.randn(1, 3, 64, 64)

        def gradients() -> list[Tensor]:
            return list(torch.autograd.grad(self.loss(model, x), list(model.parameters())))

        plain = gradients()
        model.set_grad_checkpointing()
        for ours, theirs in zip(gradients(), plain, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_half_precision_stays_finite(self) -> None:
        model = self.build()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.loss(model, torch.randn(2, 3, 64, 64))
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    def test_the_whole_model_compiles_to_one_graph(self) -> None:
        model, x = self.build().eval(), torch.randn(1, 3, 64, 64)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)

    def test_layer_groups_cover_every_parameter(self) -> None:
        model = self.build()
        for coarse in (False, True):
            groups = group_parameters(model, model.group_matcher(coarse=coarse))
            assert sorted(n for names in groups.values() for n in names) == sorted(
                n for n, _ in model.named_parameters()
            )
        names = dict(model.named_parameters())
        assert model.no_weight_decay() <= names.keys()

    def test_every_variant_has_a_configuration(self) -> None:
        names = sys.modules[timm.model_entrypoint(self.name).__module__].default_cfgs
        with initialize_config_module("conf", version_base=None):
            for name in names:
                cfg = compose(overrides=[f"+backbone={name}"]).backbone
                assert dict(cfg) == {"name": name, "pretrained": False, "checkpoint": None, "params": {}}
                assert name in backbones.available()

    def test_numbers_take_the_type_and_place_asked_for(self) -> None:
        model = self.build(dtype=torch.float64, device="cpu").eval()
        assert model(torch.randn(1, 3, 64, 64, dtype=torch.float64)).dtype == torch.float64
