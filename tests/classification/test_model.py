"""Networks by name, with attention, from weights; what they cost; and leaving them early."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import backbones
from kernels.errors import InputError
from tasks.classification.checkpoint import Description, load_checkpoint, save_checkpoint
from tasks.classification.exits import curve, figure, pooled
from tasks.classification.loading import Preprocessing
from tasks.classification.model import attention_argument, build_network, check_network, own_input_size
from tasks.common.cost import exit_flops, measure

SMALL = {"name": "test_resnet", "params": {}}
VIT = {"name": "test_vit", "params": {}}
OWN = {"name": "tests.classification.test_model:TwoExits", "params": {}}


class TwoExits(nn.Module):
    """A network with a cheap exit and a dear one, as a user may write it."""

    def __init__(self, num_classes: int = 2, attention: Any = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2)
        self.second = nn.Conv2d(8, 16, 3, stride=2)
        self.heads = nn.ModuleList([nn.Linear(8, num_classes), nn.Linear(16, num_classes)])

    def exits(self, x: torch.Tensor) -> Any:
        x = self.first(x).relu()
        yield self.heads[0](x.mean((2, 3)))
        yield self.heads[1](self.second(x).relu().mean((2, 3)))

    def forward_exits(self, x: torch.Tensor) -> list[torch.Tensor]:
        return list(self.exits(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_exits(x)[-1]


@pytest.mark.parametrize(
    ("backbone", "attention"),
    [
        (SMALL, None),
        (SMALL, {"name": "ela", "variant": "base"}),
        (SMALL, {"name": "ela", "stages": [False, None, True, "polarized_parallel"]}),
        (VIT, {"name": "neighborhood", "kernel_size": 3}),
        (OWN, None),
    ],
)
def test_networks_are_built_saved_and_found_again(backbone: dict, attention: dict | None, tmp_path: Path) -> None:
    description = Description(backbone, attention, ("a", "b", "c"), Preprocessing(32, (0.5,) * 3, (0.5,) * 3))
    model = description.build().eval()
    check_network(model, backbone["name"], 3, 32)
    save_checkpoint(tmp_path / "model.safetensors", model, description)
    again, told = load_checkpoint(tmp_path / "model.safetensors")
    assert told == description
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(image), again(image))


def test_gates_stand_only_where_the_list_has_them() -> None:
    model = build_network(SMALL, {"name": "ela", "stages": [False, True, None, False]}, 2, 32)
    assert [name for name, _ in model.named_modules() if name.endswith(".gate")] == ["layer2.gate"]
    with pytest.raises(InputError, match="must be a list"):
        attention_argument({"name": "ela", "stages": "all"})


def test_a_trained_network_is_a_start_for_another_task(tmp_path: Path) -> None:
    attention = {"name": "ela", "variant": "base"}
    description = Description(SMALL, attention, ("a", "b"), Preprocessing(32, (0.5,) * 3, (0.5,) * 3))
    model = description.build()
    save_checkpoint(tmp_path / "model.safetensors", model, description)
    started = build_network({**SMALL, "checkpoint": str(tmp_path)}, attention, 5, 32)
    ours, theirs = model.state_dict(), started.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if not key.startswith("fc."))
    assert theirs["fc.weight"].shape[0] == 5
    encoder = backbones.create_encoder(
        "test_resnet", checkpoint=tmp_path, params={"attention": attention, "img_size": 32}
    )
    tiles = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = model.eval().forward_head(model.forward_features(encoder.prepare(tiles)), pre_logits=True)  # type: ignore[operator]
    torch.testing.assert_close(encoder(tiles), features)
    with pytest.raises(InputError, match="does not fit backbone 'test_vit'"):
        build_network({**VIT, "checkpoint": str(tmp_path)}, None, 5, 32)
    with pytest.raises(InputError, match="exclude each other"):
        build_network({**SMALL, "checkpoint": str(tmp_path), "pretrained": True}, None, 5, 32)


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(InputError, match="does not take images of 1 pixels"):
        check_network(nn.Conv2d(3, 2, 7), "mine", 2, 1)
    with pytest.raises(InputError, match="gives"):
        check_network(nn.Conv2d(3, 2, 7), "mine", 2, 32)
    assert own_input_size("resnet18") == 224
    assert own_input_size("test_resnet") == 160


def test_cost_counts_what_a_convolution_and_a_layer_take() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16 * 16, 4))
    cost = measure(model, 16, torch.device("cpu"))
    assert cost.parameters == 3 * 8 * 9 + 8 * 256 * 4 + 4
    assert cost.flops == 2 * (3 * 8 * 9 * 256 + 8 * 256 * 4)
    assert cost.images_per_second > 0
    assert cost.uncounted == []


@pytest.mark.parametrize("size", [64, 96])
def test_operators_that_the_counter_does_not_know_are_counted_by_their_module(size: int) -> None:
    plain = measure(build_network(VIT, {"name": "softmax"}, 2, size), size, torch.device("cpu"))
    near = measure(build_network(VIT, {"name": "neighborhood", "kernel_size": 3}, 2, size), size, torch.device("cpu"))
    tokens, dim, blocks = (size // 16) ** 2, 64, 6
    assert near.uncounted == []
    saved = blocks * 4 * tokens * dim * (tokens - 9)
    assert plain.flops - near.flops == pytest.approx(saved, rel=0.02)


def test_exits_cost_more_the_later_they_are() -> None:
    costs = exit_flops(TwoExits(), 32)
    assert costs is not None
    assert costs[0] == 2 * (27 * 8 * 15 * 15 + 8 * 2)
    assert costs[1] == costs[0] + 2 * (72 * 16 * 7 * 7 + 16 * 2)
    assert exit_flops(nn.Linear(2, 2), 32) is None


def test_the_curve_weighs_folds_by_their_images() -> None:
    torch.manual_seed(2)
    target = torch.randint(0, 3, (90,))
    sure = nn.functional.one_hot(target, 3) * 4.0
    exits = [torch.randn(90, 3), sure]
    rows = curve(exits, exits, target, [1.0, 4.0])
    table = pooled([rows, rows])
    assert table["accuracy"].is_monotonic_increasing
    assert table["saved"].is_monotonic_decreasing
    assert ((table["share_1"] + table["share_2"]) - 1).abs().max() < 1e-9
    assert figure(table, 1.0).axes[0].get_xlabel() == "Operations saved (%)"
