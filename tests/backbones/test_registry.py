"""Backbones by name, and what is said when a name or a parameter is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from timm.models import register_model
from torch import Tensor, nn

import backbones
from kernels.errors import InputError


class OwnBackbone(nn.Module):
    """What a user might write."""

    num_features = 5

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, width, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image).mean((2, 3))


class NoModule:
    pass


@register_model
def fovea_test_mixer(pretrained: bool = False, attention: str = "own", **kwargs: object) -> nn.Module:
    model = OwnBackbone()
    model.attention = attention  # type: ignore[assignment]
    return model


def test_importing_the_package_loads_neither_torch_nor_timm() -> None:
    code = "import sys, backbones; sys.exit(bool({'torch', 'timm'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_available_lists_ours_beside_those_of_timm_in_order() -> None:
    names = backbones.available()
    assert {"resnet18", "uni", "ctranspath"} <= set(names)
    assert names == sorted(names)
    assert all(name.startswith("resnet1") for name in backbones.available("resnet1*"))
    assert backbones.available("no such pattern*") == []


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18", "timm/resnet18", "resnet18.a1_in1k"])
def test_every_spelling_of_a_timm_name_builds_the_same_network(name: str) -> None:
    model = backbones.create(name, num_classes=7)
    assert isinstance(model, timm.models.ResNet)
    assert model.fc.out_features == 7


def test_feature_maps_are_those_asked_for() -> None:
    model = backbones.create("resnet18", features_only=True, out_indices=[1, 3])
    shapes = [tuple(x.shape) for x in model(torch.zeros(1, 3, 65, 97))]
    assert shapes == [(1, 64, 17, 25), (1, 256, 5, 7)]


def test_the_truncated_resnet_and_ctranspath_give_feature_maps() -> None:
    resnet = backbones.create("resnet50_clam", features_only=True)
    assert [x.shape[1] for x in resnet(torch.zeros(1, 3, 64, 64))] == [64, 256, 512, 1024]
    swin = backbones.create("ctranspath", features_only=True, depths=(1, 1, 1, 1))
    assert swin(torch.zeros(1, 3, 224, 224))[0].shape == (1, 96, 56, 56)


def test_a_class_is_found_by_its_dotted_path() -> None:
    model = backbones.create("tests.backbones.test_registry:OwnBackbone", width=9)
    assert model(torch.zeros(2, 3, 4, 4)).shape == (2, 9)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet8", ["backbone 'resnet8' is not known", "'resnet18'", "backbones.available("]),
        ("uni2", ["'uni2_h'"]),
        ("timm:resnet8", ["'resnet18'"]),
        ("resnet18.nobody", ["no weights tagged 'nobody'", "a1_in1k"]),
        ("no.such.package:Class", ["cannot be imported", "package.module:Class"]),
        ("tests.backbones.test_registry:Absent", ["cannot be imported", "Absent"]),
        ("tests.backbones.test_registry:NoModule", ["NoModule", "torch.nn.Module is needed"]),
    ],
)
def test_a_wrong_name_is_answered_in_one_sentence_with_the_nearest_one(name: str, said: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        backbones.create(name)
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "tests.backbones.test_registry:OwnBackbone", "uni"])
def test_a_parameter_the_model_does_not_take_is_named(name: str) -> None:
    with pytest.raises(InputError, match="no_such_parameter"), torch.device("meta"):
        backbones.create(name, no_such_parameter=3)


def test_attention_is_refused_where_no_token_mixer_can_be_replaced() -> None:
    with pytest.raises(InputError, match=r"'resnet18' has no token mixer .* attention='window'.*ela"):
        backbones.create("resnet18", attention="window")


def test_attention_reaches_a_backbone_that_takes_one() -> None:
    assert backbones.create("fovea_test_mixer", attention="window").attention == "window"


def test_a_hub_id_is_not_fetched_without_pretrained(hub_cache: object) -> None:
    with pytest.raises(InputError, match=r"hf-hub:nobody/nothing.*backbone\.pretrained=true"):
        backbones.create("hf-hub:nobody/nothing")


def test_missing_weights_offline_end_in_one_sentence(hub_cache: object) -> None:
    with pytest.raises(InputError, match=r"'resnet18': its weights .*backbone\.checkpoint=FILE"):
        backbones.create("resnet18", pretrained=True)
