"""NAT, DiNAT, DiNAT_s and the isotropic networks: timm's conventions, dilations, small maps, swaps, released names."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from hydra import compose, initialize_config_module
from torch import Tensor, nn

import backbones
from backbones.nat_dilations import PRESETS, dilations_of_blocks
from backbones.nat_layers import PatchMerging
from backbones.nat_names import checkpoint_filter_fn
from kernels.errors import InputError
from tests.backbones.timm_conventions import ODD, Conventions
from tests.parity.recipe import about

# Millions of parameters to the digits that the authors print; counted here for the isotropic networks.
MILLIONS = {
    "nat_mini": 19.98,
    "nat_tiny": 27.90,
    "nat_small": 50.74,
    "nat_base": 89.77,
    "dinat_mini": 19.98,
    "dinat_tiny": 27.90,
    "dinat_small": 50.72,
    "dinat_base": 89.77,
    "dinat_large": 200.94,
    "dinat_s_tiny": 28.29,
    "dinat_s_small": 49.61,
    "dinat_s_base": 87.77,
    "dinat_s_large": 196.53,
    "nat_iso_small": 22.00,
    "nat_iso_base": 86.47,
    "dinat_iso_small": 22.00,
    "dinat_iso_base": 86.47,
    "vitrpb_small": 22.08,
    "vitrpb_base": 86.63,
}
PYRAMID: dict[str, Any] = {"depths": (1, 2, 2, 1), "embed_dim": 8, "num_heads": (1, 2, 2, 4), "kernel_size": 3}
SINGLE: dict[str, Any] = {"depth": 4, "embed_dim": 16, "num_heads": 2, "patch_size": 8, "img_size": 64}


class OnTheProcessor(Conventions):
    """Neighbourhood attention has no form without data, so that its images are real ones."""

    __test__ = False

    def test_the_published_size_gives_logits(self) -> None:
        model = self.build(img_size=224).eval()
        height, width = model.pretrained_cfg["input_size"][1:]
        with torch.no_grad():
            features = model.forward_features(torch.randn(1, 3, height, width))
            assert features.shape == (1, model.num_features, height // self.strides[-1], width // self.strides[-1])
            assert model.forward_head(features).shape == (1, 7)


class TestDiNAT(OnTheProcessor):
    __test__ = True
    name = "dinat_base"  # with layer scale
    tiny: ClassVar[dict[str, Any]] = PYRAMID


class TestDiNATs(OnTheProcessor):
    __test__ = True
    name = "dinat_s_tiny"
    tiny: ClassVar[dict[str, Any]] = PYRAMID


class TestDiNATIsotropic(OnTheProcessor):
    __test__ = True
    name = "dinat_iso_small"
    tiny: ClassVar[dict[str, Any]] = SINGLE | {"kernel_size": 3}
    strides = (8, 8, 8, 8)


class TestViTWithBiases(Conventions):
    name = "vitrpb_small"
    tiny: ClassVar[dict[str, Any]] = SINGLE
    strides = (8, 8, 8, 8)


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    with torch.device("meta"):
        model = backbones.create(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == MILLIONS[name]
    with initialize_config_module("conf", version_base=None):
        cfg = compose(overrides=[f"+backbone={name}"]).backbone
    assert dict(cfg) == {"name": name, "pretrained": False, "checkpoint": None, "params": {}}


# ---------------------------------------------------------------------------------------------------------- dilations


def dilations(model: nn.Module) -> list[list[int]]:
    return [[block.attn.dilation[0] for block in stage.blocks] for stage in model.stages]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("preset", "depths", "expected"),
    [
        ("imagenet_224", (3, 4, 6, 5), [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1]]),
        ("imagenet_224", (2, 2, 6, 2), [[1, 8], [1, 4], [1, 2, 1, 2, 1, 2], [1, 1]]),
        ("imagenet_384", (3, 4, 6, 5), [[1, 13, 1], [1, 6, 1, 6], [1, 3, 1, 3, 1, 3], [1, 1, 1, 1, 1]]),
        ("coco", (3, 4, 18, 5), [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]]),
        ("coco", (2, 2, 18, 2), [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3]]),
        ("ade20k_512", (2, 2, 6, 2), [[1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2]]),
        (
            "ade20k_640",
            (3, 4, 18, 5),
            [[1, 20, 1], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5] * 2 + [1, 5], [1, 2, 1, 2, 1]],
        ),
        (
            "mask2former",
            (3, 4, 18, 5),
            [[1, 14, 1], [1, 4, 1, 7], [1, 2, 1, 3] * 4 + [1, 3], [1, 1, 1, 1, 1]],
        ),
    ],
)
def test_presets_are_the_published_settings(preset: str, depths: tuple[int, ...], expected: list[list[int]]) -> None:
    assert dilations_of_blocks(preset, depths) == expected


def test_dilations_come_from_the_configuration_and_never_from_weights() -> None:
    near = backbones.create("nat_mini", **PYRAMID)
    far = backbones.create("dinat_mini", **PYRAMID)
    own = backbones.create("dinat_mini", **PYRAMID | {"dilations": (2, (1, 5), 3, (1, 1))})
    assert dilations(near) == [[1], [1, 1], [1, 1], [1]]
    assert dilations(far) == [[1], [1, 4], [1, 2], [1]]
    assert dilations(own) == [[2], [1, 5], [3, 3], [1]]
    own.load_state_dict(checkpoint_filter_fn(near.state_dict(), own))
    assert dilations(own) == [[2], [1, 5], [3, 3], [1]]
    iso = backbones.create("dinat_iso_small", **SINGLE)
    assert dilations(iso) == [[1], [2], [1], [2]]
    assert {"coco", "ade20k_512"} <= PRESETS.keys()


def test_a_pixel_reaches_as_far_as_the_dilated_window() -> None:
    params = PYRAMID | {"depths": (1,), "num_heads": (1,)}
    for dilation, reach in ((1, 2), (4, 8)):
        model = backbones.create("nat_mini", features_only=True, out_indices=(0,), **params, dilations=(dilation,))
        x = torch.randn(1, 3, 128, 128)
        changed = x.clone()
        changed[..., 64:68, 64:68] += 1
        with torch.no_grad():
            moved = (model(x)[0] - model(changed)[0]).abs().amax((0, 1)) > 0
        columns = moved.any(0).nonzero().flatten()
        # The stem's two convolutions spread the change to tokens 16 and 17.
        assert 16 - reach <= int(columns.min()) and int(columns.max()) <= 17 + reach
        assert int(columns.max()) > 17 + reach // 2 - 1


# --------------------------------------------------------------------------------------------------- attention, sizes


def test_each_stage_may_have_its_own_attention() -> None:
    chosen = ["softmax", {"name": "neighborhood", "kernel_size": 5, "small_maps": "clamp"}, None, "window"]
    model = backbones.create("dinat_mini", attention=chosen, **PYRAMID).eval()
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [block.attn.name for block in blocks] == ["softmax", *["neighborhood"] * 4, "window"]
    assert [block.attn.kernel_size for block in blocks[1:5]] == [(5, 5)] * 2 + [(3, 3)] * 2
    assert [block.attn.dilation[0] for block in blocks[1:5]] == [1, 4, 1, 2]
    assert model(torch.randn(1, 3, *ODD)).isfinite().all()
    iso = backbones.create("nat_iso_small", attention="agent", **SINGLE).eval()
    assert {stage.blocks[0].attn.name for stage in iso.stages} == {"agent"}
    assert iso(torch.randn(1, 3, *ODD)).isfinite().all()


def test_patches_that_are_merged_come_in_the_order_of_columns() -> None:
    merge = PatchMerging(1)
    x = torch.tensor([[0.0, 1.0, 4.0], [2.0, 3.0, 6.0]])[None, None]
    seen: list[Tensor] = []
    merge.norm = nn.Identity()  # type: ignore[assignment]
    merge.reduction.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    assert merge(x).shape == (1, 2, 1, 2)
    assert seen[0].tolist() == [[[[0, 2, 1, 3], [4, 6, 0, 0]]]]


def test_biases_of_a_whole_map_follow_offsets_and_fit_maps_of_other_sizes() -> None:
    model = backbones.create("vitrpb_small", **SINGLE).eval()
    attn = model.stages[0].blocks[0].attn
    with torch.no_grad():
        attn.qkv.weight[:32].zero_()
        attn.qkv.bias.zero_()
        offsets = torch.arange(-7.0, 8.0)
        attn.rpb.copy_(10 * offsets.expand(2, 15, 15))  # the further to the right, the better
        weights = attn(torch.randn(1, 8, 8, 16), return_attention=True)[1].unflatten(-1, (8, 8))
        assert (weights.sum(-2)[..., -1] > 0.99).all()
        mask = torch.ones(1, 8, 8, dtype=torch.bool)
        mask[..., -1] = False
        hidden = attn(torch.randn(1, 8, 8, 16), mask, return_attention=True)[1].unflatten(-1, (8, 8))
        assert (hidden.sum(-2)[0, 0].unflatten(0, (8, 8))[:, :-1, -2] > 0.99).all()
        assert (attn(torch.randn(1, 5, 11, 16), return_attention=True)[1].sum(-1) - 1).abs().max() < 1e-5
    assert attn.packed(torch.randn(12, 16), torch.tensor([0, 12]), [(3, 4)]).shape == (12, 16)


def test_dropped_branches_grow_with_depth() -> None:
    model = backbones.create("nat_mini", drop_path_rate=0.5, proj_drop_rate=0.1, **PYRAMID)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    )
    assert {block.attn.proj_drop.p for block in blocks} == {0.1}


# ----------------------------------------------------------------------------------------------------- released names


def official(name: str) -> str:
    """What the released weights call our parameter ``name`` of a pyramid."""
    parts = name.split(".")
    if parts[0] == "stages":
        stage = int(parts[1]) - (parts[2] == "downsample")
        rest = ".".join(parts[2:]).replace("ls1.gamma", "gamma1").replace("ls2.gamma", "gamma2")
        return f"levels.{stage}.{rest}"
    if parts[0] == "level_norms":
        return f"norm{parts[1]}.{parts[2]}"
    return name.replace("stem.", "patch_embed.").replace("head.fc.", "head.")


def test_released_names_load_without_leftovers() -> None:
    with torch.device("meta"):
        model = backbones.create("nat_mini")
        shapes = about("bb_nat_mini_128x160")["state_shapes"]
        state = {f"module.{key}": torch.empty(shape) for key, shape in shapes.items()}
    renamed = checkpoint_filter_fn({"epoch": torch.tensor(3), "model": state}, model)  # type: ignore[dict-item]
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    again = checkpoint_filter_fn(renamed, model)
    assert again.keys() == renamed.keys() and all(again[key] is renamed[key] for key in again)


@pytest.mark.parametrize("name", ["nat_small", "dinat_s_tiny"])
def test_the_network_that_was_released_has_these_names(name: str) -> None:
    with torch.device("meta"):
        model = backbones.create(name, level_norms=True)
    own = model.state_dict()
    state = {official(key): value for key, value in own.items()}
    if name.startswith("dinat_s"):
        state = {key.replace("levels.", "layers."): value for key, value in state.items()}
    assert not own.keys() & {key for key in state if not key.startswith("norm.")}
    renamed = checkpoint_filter_fn(state, model)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in own.items()}


def test_a_larger_kernel_takes_the_table_of_a_smaller_one_resized() -> None:
    small = backbones.create("dinat_large", **PYRAMID | {"kernel_size": 7})
    large = backbones.create("dinat_large", **PYRAMID | {"kernel_size": 11})
    state = {official(key): value for key, value in small.state_dict().items()}
    state["levels.0.blocks.0.attn.rpb"] = torch.linspace(-6, 6, 13).expand(1, 13, 13).half()
    large.load_state_dict(checkpoint_filter_fn(state, large))
    table = large.stages[0].blocks[0].attn.rpb
    assert table.shape == (1, 21, 21)
    torch.testing.assert_close(table, -table.flip(2), atol=0.01, rtol=0)  # the middle stays the middle
    assert (table[0].diff(dim=1) > 0).all()


def test_weights_of_imagenet_fit_a_network_whose_levels_have_norms_and_those_norms_are_used() -> None:
    plain = backbones.create("nat_mini", **PYRAMID)
    dense = backbones.create("nat_mini", level_norms=True, **PYRAMID).eval()
    dense.load_state_dict(checkpoint_filter_fn(plain.state_dict(), dense))
    x = torch.randn(1, 3, *ODD)
    with torch.no_grad():
        final, maps = dense.forward_intermediates(x)
        torch.testing.assert_close(final, plain.eval().forward_features(x))
    for level in maps:
        assert level.is_contiguous() and level.mean(1).abs().max() < 1e-4
    features = backbones.create("nat_mini", level_norms=True, features_only=True, out_indices=(1, 2), **PYRAMID)
    names = [name for name, _ in features.named_parameters() if "level_norms" in name]
    assert names == [f"body.model.level_norms.{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")]
    sum(y.square().sum() for y in features(x)).backward()
    assert all(p.grad is not None for p in features.parameters())


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"depths": (1, 1)}, r"depths=\[1, 1\].*as long as each other"),
        ({"dilations": "imagenet_256"}, "dilations 'imagenet_256' is not known. Did you mean 'imagenet_224'"),
        ({"dilations": (1, 2)}, r"dilations=\[1, 2\].*4 stages.*coco"),
        ({"dilations": (1, 2, 0, 1)}, "positive number"),
        ({"depths": (1, 1), "num_heads": (1, 2), "dilations": "coco"}, "dilations=coco is for 4 stages"),
        ({"attention": ["window"]}, "4 stages"),
        ({"attention": "abmil"}, "'abmil' is of kind 'pooling'"),
        ({"img_size": (64, 64, 3)}, r"img_size=\(64, 64, 3\)"),
        ({"num_heads": (3, 3, 3, 3)}, "num_heads=3"),
    ],
    ids=str,
)
def test_a_choice_that_cannot_be_is_refused_in_one_sentence(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        backbones.create("dinat_mini", **PYRAMID | params)
    assert "\n" not in str(caught.value)


def test_sizes_of_an_isotropic_network_must_be_positive() -> None:
    with pytest.raises(InputError, match="depth=0"):
        backbones.create("nat_iso_small", **SINGLE | {"depth": 0})
