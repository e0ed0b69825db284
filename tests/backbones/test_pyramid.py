"""Feature maps of images of any size: as timm gives them where it does, and what is added, frozen and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.layers.squeeze_excite import SEModule
from timm.models._features import FeatureGetterNet
from timm.models.davit import DaVit
from timm.models.gcvit import GlobalContextVit
from torch import Tensor, nn

import backbones
from backbones.checkpoints import Weights
from backbones.pyramid import Pyramid
from kernels.errors import InputError
from tests.backbones.small import HOST, OF_TIMM, small_params
from tests.parity.harness import SHARED, load_case

VIT: dict[str, Any] = {"depth": 3, "embed_dim": 32, "num_heads": 2}


def create(name: str, **params: Any) -> Pyramid:
    model = backbones.create(name, features_only=True, **small_params(name) | params)
    assert isinstance(model, Pyramid)
    return model


@pytest.mark.parametrize("name", OF_TIMM)
@torch.no_grad()
def test_images_of_the_native_size_give_timms_numbers(name: str) -> None:
    model = create(name).eval()
    plain = timm.create_model(name, **small_params(name))
    size = small_params(name).get("img_size") or plain.pretrained_cfg["input_size"][1]
    reference = FeatureGetterNet(plain, out_indices=model.body.out_indices).eval()
    reference.model.load_state_dict(model.model.state_dict())
    x = torch.randn(1, 3, size, size)
    for ours, theirs in zip(model(x), reference(x), strict=True):
        assert torch.equal(ours, theirs)
    assert model.feature_info.channels() == reference.feature_info.channels()


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "regnety_002", "pvt_v2_b0", "davit_tiny"])
@torch.no_grad()
def test_networks_that_take_any_size_are_left_alone(name: str) -> None:
    model, x = create(name).eval(), torch.randn(1, 3, 75, 106)
    assert model.size_divisor == 1 and model.sizing.prepare(x) is x
    theirs = timm.create_model(name, features_only=True, **small_params(name)).eval()
    if isinstance(theirs, FeatureGetterNet) or name == "resnet18":
        theirs.load_state_dict(model.model.state_dict(), strict=False)
        assert all(torch.equal(a, b) for a, b in zip(model(x), theirs(x), strict=True))


@pytest.mark.parametrize(
    ("name", "divisor"),
    [("convnext_atto", 32), ("swin_tiny_patch4_window7_224", 4), ("vit_tiny_patch16_224", 16), ("volo_d1_224", 16)],
)
@torch.no_grad()
def test_others_are_padded_with_zeros_right_and_below_and_cropped(name: str, divisor: int) -> None:
    model = create(name).eval()
    assert model.size_divisor == divisor
    x = torch.randn(1, 3, 75, 106)
    padded = torch.nn.functional.pad(x, (0, -106 % divisor, 0, -75 % divisor))
    for small, large, stride in zip(model(x), model(padded), model.strides, strict=True):
        rows, columns = -(-75 // stride), -(-106 // stride)
        assert torch.equal(small, large[..., :rows, :columns])


@pytest.mark.parametrize(("name", "least"), [("maxvit_pico_rw_256", 64), ("gcvit_xxtiny", 64), ("halonet26t", 256)])
@torch.no_grad()
def test_padding_inside_blocks_changes_nothing_where_windows_fit(name: str, least: int) -> None:
    """Twice the native size has whole windows at every stage: the blocks run as timm's own."""
    model = create(name).eval()
    own = timm.create_model(name, **small_params(name)).eval()
    own.load_state_dict(model.model.state_dict(), strict=False)
    maps = own.forward_intermediates(torch.ones(1, 3, least, least), intermediates_only=True)
    for ours, theirs in zip(model(torch.ones(1, 3, least, least)), maps[-len(model.channels) :], strict=True):
        assert torch.equal(ours, theirs)


def test_crossvit_states_the_strides_of_its_two_grids() -> None:
    model = create("crossvit_tiny_240")
    assert model.strides == (12, 240 / 14)
    assert [tuple(y.shape[2:]) for y in model.eval()(torch.zeros(1, 3, 480, 120))] == [(40, 10), (28, 7)]


def test_networks_of_one_size_have_images_and_maps_resized() -> None:
    model = create("beit_base_patch16_224", img_size=64)
    assert model.sizing.size == (64, 64)
    assert [tuple(y.shape[2:]) for y in model(torch.zeros(1, 3, 75, 106))] == [(5, 7)] * 3


def test_a_stem_gives_the_stride_that_unets_need() -> None:
    model = create("convnext_atto", out_strides=(2, 4, 16))
    assert model.strides == (2, 4, 16) and model.channels[1:] == (8, 24)
    assert model.feature_info.reduction() == [2, 4, 16] and tuple(model.feature_info.channels()) == model.channels
    maps = model(torch.randn(1, 3, 75, 106))
    assert [tuple(y.shape[2:]) for y in maps] == [(38, 53), (19, 27), (5, 7)]
    native = create("resnet18", out_strides=(2, 4))
    assert native.stride2 is None and native.channels == (64, 64)
    assert create("volo_d1_224", out_strides=(8, 16)).channels == (192, 384)


def test_other_channels_and_statistics_are_known() -> None:
    model = create("resnet18", in_chans=1)
    assert model.mean == (pytest.approx(0.449),) and len(model.std) == 1
    assert model(torch.zeros(1, 1, 64, 64))[0].shape == (1, 64, 32, 32)
    assert create("maxvit_pico_rw_256").mean == (0.5, 0.5, 0.5)


def test_any_index_is_counted_from_either_end_and_later_stages_go() -> None:
    model = create("metaformer_tiny", out_indices=[-4, 1])
    assert model.strides == (4, 8) and len(model.model.stages) == 2
    assert create("vit_tiny_patch16_224", out_indices=[0, 2]).strides == (16, 16)


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("convnext_atto", {"out_indices": [0, 4]}, ["out_indices=[0, 4]", "maps 0 to 3 of strides 4, 8, 16, 32"]),
        ("convnext_atto", {"out_indices": [1, 0]}, ["ascending"]),
        ("convnext_atto", {"out_strides": [4, 64]}, ["out_strides=[4, 64]", "4, 8, 16, 32"]),
        ("convnext_atto", {"out_strides": [4], "out_indices": [0]}, ["leave one of them out"]),
        ("vit_tiny_patch16_224", {"out_strides": [4, 8, 16, 32]}, ["strides 16"]),
        ("volo_d1_224", {"out_strides": [8, 16, 32]}, ["strides 8, 16", "(0: 8, 1: 16, 2: 16, 3: 16)"]),
        ("crossvit_tiny_240", {"out_strides": [4]}, ["strides 12, 17"]),
        ("convnext_atto", {"frozen_stages": 5}, ["frozen_stages=5", "4 stages"]),
        ("hrnet_w18_small", {"frozen_stages": 1}, ["frozen_stages=1", "not modules of their own"]),
        ("conch_v1_5", {}, ["conch_v1_5", "gives no feature maps"]),
    ],
    ids=str,
)
def test_what_is_no_pyramid_is_refused_in_one_sentence(name: str, params: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        create(name, **params)
    assert all(part in str(caught.value) for part in [*said, name]), str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_of_feature_maps_need_feature_maps() -> None:
    with pytest.raises(InputError, match=r"frozen_stages=1 is for feature maps"):
        backbones.create("resnet18", frozen_stages=1)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (torch.zeros(1, 3, 31, 64), "at least 32 x 32 px, not 31 x 64"),
        (torch.zeros(1, 4, 64, 64), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "floating-point"),
        (torch.zeros(3, 64, 64), r"\(3, 64, 64\)"),
    ],
)
def test_what_is_no_image_is_refused(image: Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said):
        create("convnext_atto")(image)


class Own(nn.Module):
    """A user's network of timm's conventions, whose names do not tell the order."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_info = [
            {"num_chs": 4, "reduction": 4, "module": "first"},
            {"num_chs": 8, "reduction": 8, "module": "second"},
        ]
        self.downs = nn.ModuleList([nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 8, 2, 2)])
        self.second = nn.BatchNorm2d(8)
        self.first = nn.BatchNorm2d(4)

    def forward_intermediates(self, x: Tensor, indices: Any = None, **_: Any) -> list[Tensor]:
        x = self.first(self.downs[0](x))
        maps = [x, self.second(self.downs[1](x))]
        return [maps[i] for i in indices]


def test_a_class_of_your_own_becomes_a_pyramid() -> None:
    model = backbones.create(
        "tests.backbones.test_pyramid:Own", features_only=True, out_indices=[0, 1], frozen_stages=1
    )
    assert isinstance(model, Pyramid) and model.size_divisor == 8
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert still == {f"body.model.{part}.{kind}" for part in ("downs.0", "first") for kind in ("weight", "bias")}


def test_freezing_goes_by_stages_and_takes_norms_and_embeddings() -> None:
    x = torch.randn(2, 3, 64, 64)
    stem = create("resnet18", frozen_stages=0).train()
    assert {name.split(".")[2] for name, p in stem.named_parameters() if not p.requires_grad} == {"conv1", "bn1"}
    before = stem.model.bn1.running_mean.clone()
    stem(x)
    assert torch.equal(before, stem.model.bn1.running_mean)
    assert not stem.model.bn1.training and stem.model.layer1.training
    swin = create("swin_tiny_patch4_window7_224", frozen_stages=2, level_norms=True)
    still = {name for name, p in swin.named_parameters() if not p.requires_grad}
    assert {name.split(".")[2] + name.split(".")[3] for name in still if name.startswith("body.model.layers")} == {
        "layers0",
        "layers1",
    }
    assert {name.split(".")[1] for name in still if name.startswith("level_norms")} == {"0", "1"}
    vit = create("vit_tiny_patch16_224", frozen_stages=1)
    assert not vit.model.pos_embed.requires_grad and not vit.model.cls_token.requires_grad
    assert vit.model.blocks[1].norm1.weight.requires_grad
    vit.requires_grad_(True)
    assert not vit.train().model.pos_embed.requires_grad
    everything = create("convnext_atto", frozen_stages=4, out_strides=(2, 4, 8, 16, 32))
    assert {name.split(".")[0] for name, p in everything.named_parameters() if p.requires_grad} == {"stride2"}


def test_norms_in_evaluation_mode_keep_their_statistics_and_learn() -> None:
    model = create("resnet18", norm_eval=True).train()
    before = model.model.layer1[0].bn1.running_mean.clone()
    sum(y.sum() for y in model(torch.randn(2, 3, 64, 64))).backward()
    assert torch.equal(before, model.model.layer1[0].bn1.running_mean) and model.model.layer1.training
    assert model.model.layer1[0].bn1.weight.grad is not None


def test_blocks_can_be_computed_again() -> None:
    model = create("convnext_atto")
    model.set_grad_checkpointing()
    assert model.model.stages[0].grad_checkpointing
    with pytest.raises(InputError, match="CrossVit cannot compute its blocks again"):
        create("crossvit_tiny_240").set_grad_checkpointing()


DENSE: dict[str, Any] = {
    "bb_gcvit_dense_micro": lambda: GlobalContextVit(
        img_size=96,
        embed_dim=8,
        depths=(1, 2, 2, 2),
        num_heads=(2, 2, 4, 4),
        mlp_ratio=2,
        layer_scale=0.5,
        window_size=(3, 3, 4, 3),
    ),
    "bb_davit_dense_micro": lambda: DaVit(
        depths=(1, 1, 2, 1), embed_dims=(12, 24, 36, 48), num_heads=(2, 2, 4, 4), window_size=5
    ),
}


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_dense_versions_give_the_published_maps(name: str) -> None:
    path = SHARED / f"{name}.json"
    if not path.is_file():
        pytest.skip("the parity cases are not beside this checkout")
    case = load_case(path)
    network = DENSE[name]()
    for part in network.modules():
        if isinstance(getattr(part, "se", None), SEModule):  # timm rounds its width up to eight
            width = part.conv_dw.in_channels
            part.se = SEModule(width, rd_channels=width // 4, bias=False, act_layer=nn.GELU)
    weights = Weights(dict(case.state), name)
    started = weights.start(network, name)
    model = Pyramid(network, level_norms=True).eval()
    weights.finish(model, name, started)
    assert model.has_level_norms
    for i, y in enumerate(model(case.inputs["x"])):
        torch.testing.assert_close(y, case.expected[f"output.out{i}"], rtol=case.tolerance, atol=case.tolerance)


def saved(state: dict[str, Tensor], path: Path) -> Path:
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def test_a_classifier_of_other_classes_and_absent_norms_are_of_no_account(tmp_path: Path) -> None:
    name, small = "swin_tiny_patch4_window7_224", small_params("swin_tiny_patch4_window7_224")
    whole = timm.create_model(name, num_classes=7, **small)
    state = {f"backbone.{key}": value for key, value in whole.state_dict().items() if not key.startswith("norm.")}
    state["neck.weight"] = torch.zeros(1)
    model = create(name, checkpoint=saved(state, tmp_path / "detector.safetensors"), level_norms=True)
    own = model.model.state_dict()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in own.items())


@pytest.mark.parametrize(
    ("name", "table", "params"),
    [
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn.relative_position_bias_table", {"window_size": 5}),
        ("vit_tiny_patch16_224", "pos_embed", {"img_size": (96, 64)}),
        ("volo_d1_224", "pos_embed", {"img_size": 64}),
        ("crossvit_tiny_240", "pos_embed_1", {"img_size": 480}),
        (
            "maxvit_pico_rw_256",
            "stages.0.blocks.0.attn_block.attn.rel_pos.relative_position_bias_table",
            {"img_size": 96},
        ),
        ("gcvit_xxtiny", "stages.0.blocks.0.attn.rel_pos.relative_position_bias_table", {"img_size": 96}),
    ],
)
def test_positions_are_resampled_where_sizes_changed(
    name: str, table: str, params: dict[str, Any], tmp_path: Path
) -> None:
    whole = timm.create_model(name, **small_params(name))
    given = {key: torch.ones_like(value) if key == table else value for key, value in whole.state_dict().items()}
    model = create(name, checkpoint=saved(given, tmp_path / "w.safetensors"), **params)
    found = model.model.state_dict()[table]
    assert found.shape != given[table].shape
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-4, atol=1e-4)


def test_all_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    state = timm.create_model("resnet18").state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(1, 2, 3)
    state["layer2.0.bn1.weight"] = torch.zeros(5)
    del state["conv1.weight"]
    path = saved(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError) as caught:
        create("resnet18", checkpoint=path)
    parts = [
        "layer1.0.conv1.weight (1, 2, 3) instead of (64, 64, 3, 3)",
        "layer2.0.bn1.weight",
        "missing: conv1.weight",
    ]
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="choose one of them"):
        create("resnet18", pretrained=True, checkpoint=path)
    with pytest.raises(InputError, match=r"fc\.weight \(1000, 512\) instead of \(5, 512\)"):
        backbones.create("resnet18", checkpoint=saved(timm.create_model("resnet18").state_dict(), path), num_classes=5)


def test_weights_of_a_changed_network_and_of_the_plain_one_both_load(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    plain = timm.create_model(name, **VIT)
    model = create(name, attention="softmax", checkpoint=saved(plain.state_dict(), tmp_path / "plain.safetensors"))
    assert torch.equal(model.model.blocks[1].mlp.fc1.weight, plain.blocks[1].mlp.fc1.weight)
    changed = backbones.create(name, attention="softmax", **VIT)
    path = saved(changed.state_dict(), tmp_path / "changed.safetensors")
    again = create(name, attention="softmax", checkpoint=path)
    state = again.model.state_dict()
    assert all(torch.equal(value, changed.state_dict()[key]) for key, value in state.items())
    alike = backbones.create(name, attention="softmax", checkpoint=path, **VIT)
    assert torch.equal(alike.head.weight, changed.head.weight)


def test_gates_and_mixers_can_be_put_into_a_pyramid_later() -> None:
    model = create("resnet18")
    assert backbones.add_gates(model, "ela").modules == 4
    assert model(torch.zeros(1, 3, 64, 64))[0].shape[1] == 64
    host = backbones.create("metaformer_tiny", features_only=True, **HOST)
    assert host.has_level_norms is False
