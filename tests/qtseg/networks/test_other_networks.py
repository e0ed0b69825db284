"""Levels, U-Net, self-guided attention and MONAI's networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tasks.qtseg.losses import SelfGuidedLoss
from tasks.qtseg.networks.build import build_network
from tasks.qtseg.networks.levels import Levels, nearest_levels
from tasks.qtseg.networks.self_guided import SelfGuided
from tests.qtseg.networks.small import ODD, SELF_GUIDED, UNET, build, images, released_keys, unreached


@pytest.mark.parametrize(
    ("strides", "wanted", "found"),
    [
        ((2, 4, 8, 16, 32), (8, 16, 32), [2, 3, 4]),
        ((8, 16, 32), (4, 8, 16, 32), [0, 0, 1, 2]),
        ((16,) * 12, (8, 16, 32), [3, 7, 11]),
        ((4, 8, 8, 16), (8, 16, 32), [2, 3, 3]),
        ((12.0, 16.0), (8, 16, 32), [0, 1, 1]),
    ],
    ids=str,
)
def test_the_nearest_map_is_taken_and_the_deepest_of_one_stride(
    strides: tuple[float, ...], wanted: tuple[int, ...], found: list[int]
) -> None:
    assert nearest_levels(strides, wanted) == found


def test_levels_have_the_sizes_and_widths_asked_for() -> None:
    levels = Levels((6, 6), (16, 16), (8, 16, 32), (4, 6, 8)).eval()
    maps = [torch.randn(1, 6, 3, 5) for _ in range(2)]
    found = levels(maps, ODD)
    assert [tuple(y.shape[1:]) for y in found] == [(4, 6, 10), (6, 3, 5), (8, 2, 3)]
    assert levels.sources == (0, 1, 1) and found[1] is maps[1]


def test_u_net_has_the_published_number_of_parameters_at_every_width() -> None:
    with torch.device("meta"):
        counts = {
            w: sum(p.numel() for p in build_network({"decoder": {"name": "unet", "width": w}}).parameters())
            for w in (3, 64)
        }
    assert round(counts[64] / 1e6, 2) == 31.04 and round(counts[3] / 1e3) == 69


@pytest.mark.parametrize("backbone", [None, "resnet18", "dinat_mini", "vit_tiny_patch16_224", "qtseg_encoder"], ids=str)
def test_u_net_takes_any_backbone_and_predicts_at_every_resolution(backbone: str | None) -> None:
    network: Any = build(UNET | {"deep_supervision": True}, backbone, classes=3, in_channels=1)
    x = images(ODD, channels=1)
    levels = network.train().forward_levels(x)
    assert [tuple(y.shape[2:]) for y in levels] == [
        tuple(-(-n // 2**i) for n in ODD) for i in range(len(levels))
    ] and len(levels) in (4, 5)
    sum(y.square().mean() for y in levels).backward()
    assert unreached(network) == []
    network.eval()
    torch.testing.assert_close(network(x), network.forward_levels(x)[0])
    assert len(build(UNET).forward_levels(images())) == 1  # type: ignore[operator]


def test_every_released_name_of_self_guided_attention_finds_its_place() -> None:
    with torch.device("meta"):
        network = build_network({"decoder": "self_guided", "classes": 5, "in_channels": 1})
    state = SelfGuided.checkpoint_filter(released_keys("multi_scale_self_guided_daf_stack"))
    own = network.state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in own.items()}
    assert SelfGuided.checkpoint_filter(own).keys() == own.keys()


@pytest.mark.parametrize("backbone", ["resnet18", "qtseg_encoder", "vit_tiny_patch16_224"])
def test_self_guided_attention_trains_all_of_its_parameters(backbone: str) -> None:
    network: Any = build(SELF_GUIDED, backbone, classes=3, in_channels=1).train()
    x = images(ODD, channels=1)
    levels, auxiliary = network.forward_training(x)
    assert [tuple(y.shape) for y in levels] == [(2, 3, *ODD)] * 8
    assert auxiliary.keys() == {"guided", "rebuilt"} and all(y.ndim == 0 and y > 0 for y in auxiliary.values())
    target = torch.randint(3, (2, *ODD))
    SelfGuidedLoss()(levels, auxiliary, target).backward()
    assert unreached(network) == []
    network.eval()
    levels, _ = network.forward_training(x)
    torch.testing.assert_close(network(x), torch.stack(levels[:4]).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["monai_unet", "attention_unet", "swin_unetr", "segresnet", "flexible_unet"])
def test_networks_of_monai_take_images_of_any_size(name: str) -> None:
    small: dict[str, Any] = {
        "monai_unet": {"channels": [4, 8, 8]},
        "attention_unet": {"channels": [4, 8, 8]},
        "swin_unetr": {"feature_size": 12},
        "segresnet": {"init_filters": 8},
        "flexible_unet": {"decoder_channels": [8, 8, 8, 8, 8]},
    }
    network = build_network({"decoder": {"name": name, **small[name]}, "classes": 3, "in_channels": 1}).eval()
    assert network(images(ODD, 1, 1)).shape == (1, 3, *ODD)
    out = network.train()(images((64, 64), 2, 1))
    out.square().mean().backward()
    assert any(p.grad is not None for p in network.parameters())


def test_u_net_compiles_to_one_graph() -> None:
    network = build(UNET | {"depth": 3}).eval()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), network(images()), rtol=1e-4, atol=1e-5)
