"""Token mixers and gates of the registry in networks for volumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import attention
from attention.mixer import Mixer
from kernels.errors import InputError
from tasks.meningioma.networks.agunet import AGUNet
from tasks.meningioma.networks.build import build_network
from tasks.meningioma.networks.choices import fitting, heads_for
from tasks.meningioma.networks.daunet import DAUNet
from tasks.meningioma.networks.hierarchical import Hierarchical
from tests.meningioma.networks.spheres import learnt_dice

CONFIGURATIONS = Path(__file__).parents[3] / "conf" / "attention"
TINY: dict[str, Any] = {"filters": (4,), "dims": (16, 32), "depths": (1, 2)}
SIZE = (9, 8, 13)


def configured(name: str) -> dict[str, Any]:
    """What ``+attention=NAME`` gives."""
    return dict(yaml.safe_load((CONFIGURATIONS / f"{name}.yaml").read_text()))


def test_the_modules_that_fit_are_those_that_take_three_axes() -> None:
    assert {"softmax", "agent", "neighborhood"} <= set(fitting("mixer"))
    assert "window" not in fitting("mixer") and "window" in attention.available("mixer")
    assert {"attention_gate", "ela"} <= set(fitting("gate"))


@pytest.mark.parametrize("name", fitting("mixer"))
def test_every_mixer_for_volumes_is_a_hierarchy_and_a_bottleneck(name: str) -> None:
    chosen = configured(name)
    for network in (
        build_network({"name": "hierarchical", **TINY}, attention=chosen, size=SIZE),
        build_network({"name": "agunet", "filters": (4, 16)}, attention=chosen, size=SIZE),
    ):
        mixers = [module for module in network.modules() if isinstance(module, Mixer)]
        assert mixers and all(module.name == name for module in mixers)
        levels = network.train().forward_levels(torch.randn(1, 1, *SIZE))  # type: ignore[operator]
        torch.stack([level.square().mean() for level in levels]).sum().backward()
        assert all(p.grad is not None for mixer in mixers for p in mixer.parameters() if p.grad is not None)
        assert network.eval()(torch.randn(1, 1, 11, 13, 8)).shape == (
            1,
            2,
            11,
            13,
            8,
        )


@pytest.mark.parametrize("name", fitting("gate"))
@pytest.mark.parametrize("network_name", ["agunet", "unet3d", "daunet", "dagunet", "hierarchical"])
def test_every_gate_for_volumes_is_on_every_skip(name: str, network_name: str) -> None:
    settings = {"hierarchical": TINY | {"filters": (16,)}}.get(network_name, {"filters": (16, 16, 16)})
    if "mixer" in attention.kinds_of(name):  # which +attention= then means
        network = build_network({"name": network_name, **settings, "gate": configured(name)}, size=(9, 9, 9))
    else:
        network = build_network({"name": network_name, **settings}, attention=configured(name), size=(9, 9, 9))
    gates = [level.gate for level in network.decoder.levels]  # type: ignore[union-attr]
    assert [gate.name for gate in gates] == [name] * len(gates)
    assert network.eval()(torch.randn(1, 1, 9, 9, 10)).shape == (1, 2, 9, 9, 10)


def test_a_gate_or_mixer_by_stage() -> None:
    network = build_network(
        {"name": "agunet", "filters": (4, 8, 8)}, attention={"name": "ulsam", "stages": [True, False]}
    )
    assert [None if level.gate is None else level.gate.name for level in network.decoder.levels] == ["ulsam", None]  # type: ignore[union-attr]
    network = build_network(
        {"name": "hierarchical", **TINY}, attention={"name": "agent", "stages": [False, "flow"]}, size=SIZE
    )
    assert [stage.blocks[0].mixer.name for stage in network.stages] == ["neighborhood", "flow"]  # type: ignore[union-attr]


def test_without_attention_there_are_windows_and_then_all_voxels() -> None:
    network = Hierarchical(**TINY, size=SIZE)
    assert [stage.blocks[0].mixer.name for stage in network.stages] == ["neighborhood", "softmax"]  # type: ignore[union-attr]
    with torch.device("meta"):
        assert sum(p.numel() for p in Hierarchical().parameters()) == 7_850_316


def test_a_mixer_stands_in_front_of_the_dual_attention() -> None:
    x = torch.randn(1, 1, 12, 9, 10)
    network = DAUNet(filters=(4, 8, 8), mixer="softmax", size=(12, 12, 12)).eval()
    assert network.mixer is not None and network.dual is not None
    assert network(x).shape == (1, 2, 12, 9, 10)
    assert AGUNet(filters=(4, 8)).mixer is None


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("abmil", "of kind 'pooling', which has no place here; these fit: mixers of tokens: agent"),
        ("window", "'window' takes no volumes; these do: mixers of tokens: agent"),
        ("elaa", "'elaa' is not known. Did you mean 'ela'"),
        ({"nam": "ela"}, "is not understood"),
        ({"name": "ela", "variants": "timm"}, "no parameter 'variants'. Did you mean 'variant'"),
        ({"name": "ulsam", "stages": [True]}, "a list of 2, is needed"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(chosen: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_network({"name": "agunet", "filters": (4, 8, 8)}, attention=chosen)


def test_a_gate_is_no_mixer_and_a_mixer_no_gate() -> None:
    with pytest.raises(InputError, match=r"'ela' is of kind 'gate'.*mixers of tokens"):
        AGUNet(filters=(4, 8), mixer="ela")
    with pytest.raises(InputError, match=r"'agent' is of kind 'mixer'.*gates of skip connections"):
        AGUNet(filters=(4, 8), gate="agent")


@pytest.mark.parametrize(("dim", "head_dim", "heads"), [(64, 32, 2), (48, 32, 2), (8, 32, 1), (13, 4, 13), (1, 1, 1)])
def test_heads_divide_the_channels(dim: int, head_dim: int, heads: int) -> None:
    assert heads_for(dim, head_dim) == heads and dim % heads == 0


def test_axes_are_halved_as_often_as_there_are_levels() -> None:
    network = Hierarchical(**TINY, size=SIZE).eval()
    levels = network.forward_levels(torch.randn(1, 1, *SIZE))
    assert [tuple(level.shape[2:]) for level in levels] == [SIZE, (5, 4, 7)]
    with pytest.raises(InputError, match=r"filters=.* must be at least one positive"):
        Hierarchical(filters=())
    with pytest.raises(InputError, match=r"dims=.*one positive entry for each stage"):
        Hierarchical(dims=(8, 8), depths=(1,))


def test_it_learns_spheres() -> None:
    assert learnt_dice(Hierarchical(filters=(8,), dims=(16, 16), depths=(1, 1), size=(16, 16, 16)), steps=40) > 0.9
