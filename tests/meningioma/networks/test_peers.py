"""MONAI's networks behind the contract of ours."""

import copy
from typing import Any

import pytest
import torch

from kernels.errors import InputError
from tasks.meningioma.networks.peers import PEERS, MonaiNetwork

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": (4, 8, 16), "strides": (2, 2)},
    "attention_unet": {"channels": (4, 8, 16), "strides": (2, 2)},
    "swin_unetr": {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
    "segresnet": {"init_filters": 8},
    "segresnet_ds": {"init_filters": 8},
    "dynunet": {"filters": (4, 8, 16, 16, 16)},
}
LEVELS = {"dynunet": 4, "segresnet_ds": 3}


def build(name: str, **params: Any) -> MonaiNetwork:
    return MonaiNetwork(name, **{**SMALL[name], **params})


@pytest.mark.parametrize("name", sorted(PEERS))
def test_odd_sizes_work_at_every_level_and_the_network_trains(name: str) -> None:
    network = build(name, in_channels=2, classes=3)
    size = [least + 1 + axis for axis, least in enumerate(network.smallest)]
    if name == "swin_unetr":
        size = [32, 33, 32]
    x = torch.randn(2, 2, *size)
    levels = network.train().forward_levels(x)
    assert len(levels) == LEVELS.get(name, 1)
    for index, level in enumerate(levels):
        assert level.shape == (2, 3, *(-(-side // 2**index) for side in size))
    torch.stack([level.square().mean() for level in levels]).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert network.training and all(module.training for module in network.modules())
    with torch.no_grad():
        levels = network.eval().forward_levels(x)
        assert torch.equal(network(x), levels[0]) and len(levels) == LEVELS.get(name, 1)
        assert network(x[:0]).shape == (0, 3, *size)
        assert torch.equal(copy.deepcopy(network)(x), levels[0])
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("name", ["unet", "dynunet", "segresnet", "segresnet_ds"])
def test_where_nothing_is_padded_it_is_monais_own_output(name: str) -> None:
    network = build(name).eval()
    x = torch.randn(1, 1, 32, 16, 16)
    assert torch.equal(network(x), network.network(x))
    network.train()
    assert torch.equal(network(x), network.forward_levels(x)[0])


def test_strides_by_axis_set_what_each_axis_is_padded_to() -> None:
    network = MonaiNetwork(
        "dynunet",
        kernel_size=[3, 3, 3],
        strides=[1, [2, 2, 1], 2],
        upsample_kernel_size=[[2, 2, 1], 2],
        filters=[4, 8, 8],
        deep_supr_num=1,
    )
    assert network.multiple == (4, 4, 2)
    levels = network.forward_levels(torch.randn(1, 1, 9, 10, 7))
    assert [tuple(level.shape[2:]) for level in levels] == [(9, 10, 7), (5, 5, 7)]


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("unet", {"channel": (4, 8)}, "no parameter 'channel'. Did you mean 'channels'"),
        ("unet", {"out_channels": 4}, "no parameter 'out_channels'"),
        ("unet", {"channels": (4, 8), "strides": (2, 2)}, "one stride less than levels"),
        ("swin_unetr", {"feature_size": 13}, "MONAI's SwinUNETR cannot be built so"),
        ("unet", {"classes": 1}, "at least 2"),
    ],
)
def test_impossible_parameters_are_refused_in_one_sentence(name: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        MonaiNetwork(name, **params)
    assert str(caught.value).startswith(f"network '{name}'") and "\n" not in str(caught.value)


def test_sizes_that_leave_a_single_voxel_or_less_are_refused() -> None:
    network = build("unet")
    with pytest.raises(InputError, match=r"a volume of 4x4x4 voxels becomes a single voxel.*longer than 4"):
        network(torch.zeros(1, 1, 4, 4, 4))
    with pytest.raises(InputError, match=r"axis 2 of the volume has 3 voxels.*smallest that works is 4"):
        network(torch.zeros(1, 1, 8, 8, 3))
    assert network(torch.zeros(1, 1, 5, 4, 4)).shape == (1, 2, 5, 4, 4)
