"""Networks from their configuration."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor, nn

from kernels.errors import InputError
from tasks.meningioma.networks.build import OURS, available_networks, build_network, refuse_backbone
from tasks.meningioma.networks.peers import PEERS

CONFIGURATIONS = Path(__file__).parents[3] / "conf" / "network"
HERE = "tests.meningioma.networks.test_build"


class Plain(nn.Module):
    """A network of a user's own: logits alone, sizes in multiples of 4."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, width, 4, stride=4)
        self.up = nn.ConvTranspose3d(width, num_classes, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        if any(side % 4 for side in x.shape[2:]):
            raise ValueError(f"sizes must be multiples of 4, not {tuple(x.shape)}")
        return self.up(self.conv(x))


class Levelled(Plain):
    """One with two levels."""

    def forward_levels(self, x: Tensor) -> list[Tensor]:
        out = self(x)
        return [out, out[:, :, ::2, ::2, ::2]]


class Flat(nn.Module):
    """One that does not give a map."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3, 4))


@pytest.mark.parametrize("name", available_networks())
def test_every_network_has_a_file_with_its_defaults(name: str) -> None:
    settings = yaml.safe_load((CONFIGURATIONS / f"{name}.yaml").read_text())
    assert settings.pop("name") == name
    if name in OURS:
        cls, changed = OURS[name]
        for key, value in settings.items():
            default = changed.get(key, inspect.signature(cls).parameters[key].default)
            assert value == (list(default) if isinstance(default, tuple) else default), key
    else:
        defaults = {key: list(v) if isinstance(v, tuple) else v for key, v in PEERS[name].defaults.items()}
        assert settings == defaults


@pytest.mark.parametrize("name", [n for n in available_networks() if n != "swin_unetr"])
def test_every_file_builds_its_network(name: str) -> None:
    settings = OmegaConf.load(CONFIGURATIONS / f"{name}.yaml")
    with torch.device("meta"):
        network = build_network(settings, in_channels=2, classes=3, size=(128, 128, 144))  # type: ignore[arg-type]
        assert network(torch.empty(1, 2, 64, 48, 48)).shape == (1, 3, 64, 48, 48)
    assert network.name == name


def test_the_plain_unet_has_nothing_of_agunets() -> None:
    network = build_network({"name": "unet3d", "filters": (4, 8, 8)})
    assert not any("gate" in key or "pyramid" in key for key in network.state_dict())
    assert len(network.decoder.heads) == 1  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "agnet"}, "'agnet' is not known. Did you mean 'agunet'"),
        ({"name": "resnet18"}, "'resnet18' is a backbone for images of two axes"),
        ({}, "network '' is not known"),
        ({"name": "agunet", "filtres": [4]}, "no parameter 'filtres'. Did you mean 'filters'"),
        ({"name": "agunet", "size": [1, 2, 3]}, "no parameter 'size'"),
        ({"name": "agunet", "filters": [4, 8.5]}, "network 'agunet': filters"),
        ({"name": "agunet", "input_pyramid": "false"}, "network 'agunet': input_pyramid='false' must be true or false"),
        ({"name": "dagunet", "filters": [8]}, "network 'dagunet': .*at least two levels"),
        ({"name": "no.such:Thing"}, "cannot be imported"),
        ({"name": f"{HERE}:HERE"}, "is no class of networks"),
        ({"name": f"{HERE}:Plain", "depth": 3}, "cannot be built from"),
        ({"name": f"{HERE}:Plain", "multiple": 0}, "multiple=0 must be a whole number"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        build_network(settings)
    assert "\n" not in str(caught.value)


def test_a_size_that_is_too_small_is_refused_before_training() -> None:
    with pytest.raises(InputError, match=r"network 'agunet': axis 2 of the volume has 32 voxels.*works is 33"):
        build_network({"name": "agunet"}, size=(128, 128, 32))
    with pytest.raises(InputError, match="must have three axes"):
        build_network({"name": "agunet", "filters": (4, 8)}, size=(128, 128))


def test_attention_has_no_place_in_networks_that_are_used_as_they_are() -> None:
    for name in ("unet", f"{HERE}:Plain"):
        with pytest.raises(InputError, match=r"has no place for \+attention=ela; these have: agunet, dagunet"):
            build_network({"name": name}, attention={"name": "ela"})


def test_a_backbone_is_refused_in_one_sentence() -> None:
    refuse_backbone(None)
    with pytest.raises(InputError, match="backbone=resnet18 is for images of two axes"):
        refuse_backbone({"name": "resnet18"})


@pytest.mark.parametrize(("name", "levels"), [("Plain", 1), ("Levelled", 2)])
def test_a_class_of_the_users_own_is_padded_to_its_multiple(name: str, levels: int) -> None:
    network = build_network({"name": f"{HERE}:{name}", "multiple": 4, "width": 5}, in_channels=2, classes=3).eval()
    x = torch.randn(1, 2, 9, 8, 6)
    found = network.forward_levels(x)  # type: ignore[operator]
    assert len(found) == levels and found[0].shape == (1, 3, 9, 8, 6)
    assert torch.equal(found[0], network(x))


def test_a_class_of_the_users_own_that_gives_something_else_is_refused() -> None:
    with pytest.raises(InputError, match=r"gives \(1, 1\) for a volume .* logits \(1, 2, 5, 5, 5\) are needed"):
        build_network({"name": f"{HERE}:Flat"})(torch.zeros(1, 1, 5, 5, 5))
    with pytest.raises(InputError, match=r"does not take a volume .*multiples of 4.*network\.multiple \(now 1\)"):
        build_network({"name": f"{HERE}:Plain"})(torch.zeros(1, 1, 5, 5, 5))
