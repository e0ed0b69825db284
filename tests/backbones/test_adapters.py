"""Backbones in MONAI's FlexibleUNet, in mmdet, and trained by low-rank adapters."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import backbones
from backbones import mmdet_adapter, monai_adapter
from kernels.errors import InputError
from tests.backbones.small import HOST, small_params

VIT: dict[str, Any] = {"depth": 3, "embed_dim": 32, "num_heads": 2}


class Registry:
    """As much of mmengine's as the adapter uses."""

    def __init__(self) -> None:
        self.module_dict: dict[str, type] = {}

    def register_module(self, module: type) -> None:
        self.module_dict[module.__name__] = module


class BaseModule(nn.Module):
    """As much of mmengine's as the adapter uses."""

    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__()
        self.init_cfg, self.initialised = init_cfg, False

    def init_weights(self) -> None:
        self.initialised = True


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class for mmdet, the real one where that is installed."""
    if importlib.util.find_spec("mmdet") is None:
        made: dict[str, Any] = {"mmdet.registry": {"MODELS": Registry()}, "mmengine.model": {"BaseModule": BaseModule}}
        for name, content in made.items():
            package = name.partition(".")[0]
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
            module = types.ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
    return mmdet_adapter.register()


def test_a_detector_gets_a_tuple_of_maps(detector: Any) -> None:
    assert mmdet_adapter.register() is detector and detector.__name__ == "FoveaBackbone"
    model = detector("metaformer_tiny", out_indices=(1, 3), frozen_stages=1, norm_eval=True, level_norms=True, **HOST)
    model.init_weights()
    maps = model.train()(torch.randn(1, 3, 64, 96))
    assert isinstance(maps, tuple) and [y.shape[2] for y in maps] == [8, 2]
    assert not model.pyramid.model.stages[0].training and model.pyramid.model.stages[1].training
    names = [name for name, _ in model.named_parameters() if "level_norms" in name]
    assert names and all(any(key in name for key in mmdet_adapter.PARAMWISE["custom_keys"]) for name in names)
    again = detector("metaformer_tiny", with_cp=True, **HOST)
    assert again.pyramid.model.stages[0].grad_checkpointing


def test_a_detector_loads_its_backbones_weights(detector: Any, tmp_path: Path) -> None:
    state = timm.create_model("resnet18").state_dict()
    file = tmp_path / "detector.safetensors"
    safetensors.torch.save_file({f"backbone.{key}": value for key, value in state.items()}, file)
    for prefix in (None, "backbone."):
        model = detector("resnet18", init_cfg={"type": "Pretrained", "checkpoint": str(file), "prefix": prefix})
        model.init_weights()
        assert torch.equal(model.pyramid.model.conv1.weight, state["conv1.weight"])
    own = tmp_path / "own.safetensors"
    safetensors.torch.save_file({f"backbone.{key}": value for key, value in model.state_dict().items()}, own)
    other = detector("resnet18", init_cfg={"type": "Pretrained", "checkpoint": str(own)})
    other.init_weights()
    assert torch.equal(other.pyramid.model.conv1.weight, state["conv1.weight"])
    for wrong, said in (
        ({"checkpoint": "https://example.org/w.pth"}, "must be a file"),
        ({"checkpoint": str(file), "prefix": "neck"}, "begins no name"),
    ):
        with pytest.raises(InputError, match=said):
            detector("resnet18", init_cfg={"type": "Pretrained", **wrong}).init_weights()


@pytest.mark.parametrize(
    ("call", "module", "said"),
    [
        (mmdet_adapter.register, "mmdet.registry", "mim install"),
        (lambda: monai_adapter.register("resnet18"), "monai.networks.blocks.encoder", "pip install monai"),
        (lambda: backbones.create("vit_tiny_patch16_224", lora="*.qkv", **VIT), "peft", "pip install peft"),
    ],
)
def test_what_is_not_installed_is_said_with_the_command(
    call: Any, module: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
def test_flexible_unet_takes_a_backbone_with_and_without_stride_two(name: str) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    known = monai_adapter.register(name, **small_params(name))
    network = nets.FlexibleUNet(in_channels=1, out_channels=2, backbone=known)
    assert network(torch.randn(1, 1, 75, 106)).shape[:2] == (1, 2)
    assert network(torch.randn(1, 1, 64, 96)).shape == (1, 2, 64, 96)
    with pytest.raises(InputError, match="spatial_dims=3"):
        monai_adapter.encoder_class(name, **small_params(name))(spatial_dims=3)


def test_flexible_unet_is_refused_what_has_one_stride() -> None:
    pytest.importorskip("monai.networks.nets")
    with pytest.raises(InputError, match="strides 16"):
        monai_adapter.register("vit_tiny_patch16_224", **VIT)


def test_adapters_alone_are_trained() -> None:
    pytest.importorskip("peft")
    x = torch.randn(1, 3, 64, 64)
    torch.manual_seed(0)
    plain = backbones.create("vit_tiny_patch16_224", features_only=True, **VIT).eval()
    torch.manual_seed(0)
    lora = {"target": "*.qkv", "rank": 2, "alpha": 4}
    model = backbones.create("vit_tiny_patch16_224", features_only=True, lora=lora, frozen_stages=1, **VIT)
    assert model.training
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all("lora_" in name and "blocks.0" not in name for name in trained)
    model.eval()
    for ours, theirs in zip(model(x), plain(x), strict=True):  # adapters start as nothing
        torch.testing.assert_close(ours, theirs)
    sum(y.square().sum() for y in model.train()(x)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ("*.nothing", ["lora.target='*.nothing'", "they end in", "qkv"]),
        ({"target": "*.qkv", "rnk": 3}, ["is not understood", "rank"]),
        ({"rank": 3}, ["is not understood"]),
        ({"target": "*.qkv", "rank": 0}, ["lora.rank=0"]),
    ],
    ids=str,
)
def test_adapters_that_are_impossible_are_refused(lora: Any, said: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        backbones.create("vit_tiny_patch16_224", lora=lora, **VIT)
    assert all(part in str(caught.value) for part in said), str(caught.value)
