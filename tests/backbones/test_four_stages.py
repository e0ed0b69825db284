"""What networks of several stages share: choices, weights of other sizes, and their configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from torch import nn

import backbones
from attention.agent import AgentAttention
from attention.window import WindowAttention
from backbones import dependency_vit, duoformer, four_stages, global_deit, global_swin, l2vit, mavit, ninformer, weights
from kernels.errors import InputError

FAMILIES = (mavit, l2vit, global_swin, global_deit, ninformer, dependency_vit, duoformer)
CONFIGURED = [name.partition(".")[0] for family in FAMILIES for name in family.default_cfgs]


@pytest.mark.parametrize("name", CONFIGURED)
def test_each_configuration_composes_and_names_a_backbone(name: str) -> None:
    with initialize_config_module("conf", version_base=None):
        cfg = compose(overrides=[f"+backbone={name}"]).backbone
    assert dict(cfg) == {"name": name, "pretrained": False, "checkpoint": None, "params": {}}
    assert cfg.name in backbones.available()


def test_tables_of_another_window_or_map_are_resized() -> None:
    small = nn.ModuleDict({"w": WindowAttention(8, 2, 3), "a": AgentAttention(8, 2, (4, 6), agents=4)})
    large = nn.ModuleDict({"w": WindowAttention(8, 2, 5), "a": AgentAttention(8, 2, (8, 6), agents=4)})
    with torch.no_grad():
        small["a"].bias.ah_bias.fill_(0.25)
    fitted = weights.with_tables_resized(small.state_dict(), large)
    large.load_state_dict(fitted)
    assert fitted["a.bias.ah_bias"].shape == (1, 2, 4, 8, 1) and fitted["a.bias.ah_bias"].unique().item() == 0.25
    torch.testing.assert_close(fitted["a.bias.aw_bias"], small["a"].bias.aw_bias)
    table = small["w"].relative_position_bias_table.view(5, 5, 2)
    centre = fitted["w.relative_position_bias_table"].view(9, 9, 2)[4, 4]
    torch.testing.assert_close(centre, table[2, 2], rtol=1e-3, atol=1e-4)


def test_weights_come_out_of_training_checkpoints() -> None:
    weight = torch.ones(1)
    assert weights.unwrapped({"model": {"module.a": weight}, "epoch": 3}) == {"a": weight}
    assert weights.unwrapped({"state_dict": {"model_ema": {"a": weight}}}) == {"a": weight}
    assert weights.unwrapped({"a": weight}) == {"a": weight}


def test_averaged_weights_come_first_and_what_is_no_tensor_is_left_out() -> None:
    weight, averaged = torch.ones(1), torch.zeros(1)
    held = {"model": {"a": weight}, "state_dict_ema": {"module.a": averaged, "module.epoch": 3}}
    assert weights.unwrapped(held) == {"a": averaged}


@pytest.mark.parametrize("name", ["metaformer_tiny", "biformer_tiny", "nat_mini", "mavit_tiny"])
def test_stopping_early_does_not_change_the_features(name: str) -> None:
    model, x = backbones.create(name).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        final, (first,) = model.forward_intermediates(x, indices=[0], stop_early=True)
        torch.testing.assert_close(final, model.forward_features(x))
    assert first.shape[1:] == (model.feature_info[0]["num_chs"], 16, 16)


def test_drop_path_grows_evenly_over_all_blocks() -> None:
    assert four_stages.drop_path_rates(0.3, (1, 2, 1)) == [[0.0], pytest.approx([0.1, 0.2]), [pytest.approx(0.3)]]


@pytest.mark.parametrize("size", [0, (3, 4, 5), (8, 0)])
def test_an_impossible_image_size_is_refused(size: int | tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="img_size="):
        four_stages.stage_grids(size, (4, 8))
    assert four_stages.stage_grids((75, 106), (4, 8)) == [(19, 27), (10, 14)]


class Doubled(nn.Module):
    """A mixer of a user's own, which knows neither heads nor masks."""

    kind = "mixer"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("mavit_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1)}),
        ("l2vit_tiny", {"depths": (2, 1, 1, 1), "dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1)}),
        ("agent_swin_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1)}),
        ("inline_deit_tiny", {"depth": 2, "embed_dim": 8, "num_heads": 2}),
        ("ninformer_patch4_32", {"depth": 2, "embed_dim": 8}),
        ("dependencyvit_tiny", {"depth": 2, "embed_dim": 8, "num_heads": 2}),
        ("duoformer_resnet18_s4", {"depth": 2, "embed_dim": 8, "num_heads": 2}),
    ],
)
def test_a_mixer_of_your_own_goes_into_every_family(name: str, params: dict[str, Any]) -> None:
    path = "tests.backbones.test_four_stages:Doubled"
    model = backbones.create(name, attention=path, num_classes=3, **params)
    model(torch.randn(2, 3, 64, 70)).square().sum().backward()
    learned = [p for n, p in model.named_parameters() if n.endswith("scale") and p.shape == (8,)]
    assert learned and all(p.grad is not None and p.grad.isfinite().all() for p in learned)
    with pytest.raises(InputError, match="no mask"):
        four_stages.taking_masks(Doubled(8))(torch.zeros(1, 2, 2, 8), torch.ones(1, 2, 2, dtype=torch.bool))
