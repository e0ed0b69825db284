"""Dynamic Perceiver: timm's conventions, its exits, and its released weights' names."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.dynamic_branches import create_branch
from backbones.dynamic_perceiver import checkpoint_filter_fn
from backbones.early_exit import exit_loss
from kernels.errors import InputError
from tests.backbones.timm_conventions import Conventions

SMALL: dict[str, Any] = {"num_latents": 16, "depths": (1, 1, 1, 1)}
BRANCHES: dict[str, dict[str, Any]] = {
    "resnet": {"cnn": "resnet50", "cnn_width": 0.125, "cnn_depths": (1, 1, 1, 1)},
    "mobilenet": {"cnn": "mobilenetv3_large", "cnn_width": 0.25},
    "regnet": {"cnn": "regnety_002", "num_heads": (1, 2, 4, 8)},
}


class TestDynamicPerceiver(Conventions):
    name = "dynperceiver_resnet50_0375_t128"
    tiny: ClassVar[dict[str, Any]] = {**SMALL, **BRANCHES["resnet"]}

    def loss(self, model: nn.Module, x: Tensor) -> Tensor:
        exits = model.forward_exits(x)  # type: ignore[operator]
        return exit_loss(exits, torch.arange(len(x)) % exits[0].shape[1])


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("dynperceiver_reg400m_t32", 1000, 10_029_228),
        # The number that the authors' training code writes to its log for 100 classes.
        ("dynperceiver_mobilenetv3_075_t128", 100, 7_077_840),
    ],
)
def test_parameters_are_as_many_as_published(name: str, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        model = backbones.create(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("branch", BRANCHES)
def test_every_branch_gives_a_pyramid_of_any_size(branch: str) -> None:
    model = backbones.create("dynperceiver_reg400m_t32", features_only=True, **{**SMALL, **BRANCHES[branch]}).eval()
    maps = model(torch.randn(1, 3, 75, 106))
    assert [tuple(y.shape[2:]) for y in maps] == [(19, 27), (10, 14), (5, 7), (3, 4)]
    assert [y.shape[1] for y in maps] == model.feature_info.channels()


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_last_exit_is_the_forward_pass_and_earlier_ones_need_less(branch: str) -> None:
    model = backbones.create("dynperceiver_reg400m_t32", num_classes=5, **{**SMALL, **BRANCHES[branch]}).eval()
    x = torch.randn(2, 3, 75, 106)
    seen: list[str] = []
    for i, stage in enumerate(model.stages):
        stage.cnn.register_forward_hook(lambda *_, i=i: seen.append(f"stage {i + 1}"))
    with torch.no_grad():
        exits = model.exits(x)
        first = next(exits)
        assert seen == ["stage 1", "stage 2"]
        second = next(exits)
        assert seen == ["stage 1", "stage 2", "stage 3"]
        third, last = exits
        torch.testing.assert_close((first, second, third, last), model.forward_exits(x))
        torch.testing.assert_close(last, model(x))


def test_what_the_latent_knows_reaches_every_pixel() -> None:
    model = backbones.create("dynperceiver_reg400m_t32", **SMALL, **BRANCHES["resnet"]).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model.forward_intermediates(x, intermediates_only=True)
        model.latent.add_(torch.randn_like(model.latent))
        after = model.forward_intermediates(x, intermediates_only=True)
    for old, new in zip(before, after, strict=True):
        assert ((old - new).abs().amax(1) > 0).all()


def _official_names(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released ResNet and MobileNetV3 models, written from their layout."""
    layers = {
        "norm_query": "cross_attn.q_norm",
        "norm_context": "cross_attn.kv_norm",
        "attn.q": "{kind}.attention.q_proj",
        "attn.k": "{kind}.attention.k_proj",
        "attn.v": "{kind}.attention.v_proj",
        "attn.proj": "{kind}.attention.o_proj",
        "attn.key_bias": "{kind}.attention.relative_position_bias",
        "norm": "self_attn.norm",
        "mlp.norm": "mlp.layernorm",
    }
    found = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        leaf = f".{parts[-1]}"
        if key.startswith("stages") and parts[2] != "cnn":
            stage, part = int(parts[1]), parts[2]
            kind = "self_attn" if part == "think" else "cross_attn"
            skip = {"think": 4, "read": 4, "write": 3}.get(part, 3)
            rest = ".".join(parts[skip:]).removesuffix(leaf)
            if parts[-1] == "key_bias":
                rest, leaf = "attn.key_bias", ""
            inner = layers.get(rest, rest).format(kind=kind)
            owner = {
                "read": f"cross_att{stage + 1}_x2z",
                "write": "last_cross_att_z2x" if stage == 3 else f"cross_att{stage + 2}_z2x",
                "think": f"self_att{stage + 1}.{parts[3]}",
                "halve": f"token_mixer.{stage}",
                "widen": f"token_expander.{stage}",
            }[part]
            if key.startswith(f"stages.{stage}.read.local"):
                owner, inner = f"dwc{stage + 1}_x2z", ""
            key = ".".join(filter(None, (owner, inner))) + leaf
        elif key.startswith("stages"):
            key = f"cnn_body_stage{int(parts[1]) + 1}." + ".".join(parts[3:])
        found[key] = tuple(value.shape)
    return found


def test_released_names_of_a_resnet_branch_load_without_leftovers() -> None:
    with torch.device("meta"):
        model = backbones.create("dynperceiver_resnet50_0375_t128")
    head = {
        "head.exit1": "early_classifier3",
        "head.exit2": "classifier_att",
        "head.exit3.fc": "classifier_cnn",
        "head.exit4.bn": "classifier_merge.0",
        "head.exit4.fc": "classifier_merge.1",
        "head.recycle1.fc": "isc3.0",
        "head.recycle1.bn": "isc3.1",
        "head.recycle2.fc": "isc4.0",
        "head.recycle2.bn": "isc4.1",
        "stem.conv": "cnn_stem.0",
        "stem.bn": "cnn_stem.1",
    }
    state = {}
    for key, shape in _official_names(model).items():
        owner, _, leaf = key.rpartition(".")
        state[f"module.{head.get(owner, owner)}.{leaf}".replace("..", ".")] = torch.empty(shape, device="meta")
    renamed = checkpoint_filter_fn({"model": state}, model)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert checkpoint_filter_fn(renamed, model).keys() == renamed.keys()


def test_released_names_of_a_mobilenet_branch_load_without_leftovers() -> None:
    torchvision = pytest.importorskip("torchvision.models.mobilenetv3")
    with torch.device("meta"):
        model = backbones.create("dynperceiver_mobilenetv3_075_t128")
        settings, last = torchvision._mobilenet_v3_conf("mobilenet_v3_large", width_mult=0.75)
        features = torchvision.MobileNetV3(settings, last).features.state_dict()
    places = [*((f"cnn_stem.{i}", i) for i in range(3))]
    for stage, (start, end) in enumerate(((3, 5), (5, 8), (8, 14), (14, 17)), start=1):
        places += [(f"cnn_body_stage{stage}.{i - start}", i) for i in range(start, end)]
    state = {}
    for place, i in places:
        state |= {f"{place}.{k.split('.', 1)[1]}": v for k, v in features.items() if k.startswith(f"{i}.")}
    # The other branch's names are the same with every convolutional branch.
    state["cross_att1_x2z.mlp.fc1.weight"] = state["classifier_cnn.0.weight"] = torch.empty(0)
    renamed = checkpoint_filter_fn(state, model)
    own = {k: v.shape for k, v in model.state_dict().items() if k.startswith("stem.") or ".cnn." in k}
    assert {k: v.shape for k, v in renamed.items() if k in own} == own
    assert len(renamed) == len(own) + 2


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"num_latents": 12}, "num_latents=12"),
        ({"depths": (1, 1, 1)}, "one positive entry per stage"),
        ({"num_heads": (3, 2, 4, 8)}, r"num_heads=\[3, 2, 4, 8\]"),
        ({"cnn": "resnet51"}, "feature branch 'resnet51'.*resnet50"),
        ({"cnn": "regnety_004", "cnn_width": 0.5}, "width=0.5"),
        ({"global_pool": ""}, "num_classes=0"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_in_one_sentence(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said), torch.device("meta"):
        backbones.create("dynperceiver_reg400m_t32", **params)


def test_a_model_without_classifiers_has_no_exits() -> None:
    model = backbones.create("dynperceiver_reg400m_t32", num_classes=0, **SMALL, **BRANCHES["resnet"])
    with pytest.raises(InputError, match="reset_classifier"):
        model.forward_exits(torch.zeros(2, 3, 64, 64))


def test_branches_are_those_of_torchvision() -> None:
    models = pytest.importorskip("torchvision").models
    ours, theirs = create_branch("regnety_008"), models.regnet_y_800mf()
    counted = sum(p.numel() for part in (ours.stem, *ours.stages) for p in part.parameters())
    assert counted == sum(p.numel() for p in theirs.parameters()) - sum(p.numel() for p in theirs.fc.parameters())
