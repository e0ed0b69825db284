"""AGUNet, DAUNet and DAGUNet: counts, sizes, gradients, what each switch does, learning."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attention.dual_position_channel import PositionAttention
from kernels.errors import InputError
from kernels.measure import peak_memory
from tasks.meningioma.networks.agunet import AGUNet
from tasks.meningioma.networks.blocks import ConvBlock, UpConv, batch_norm, up_norm
from tasks.meningioma.networks.daunet import DAUNet
from tasks.meningioma.networks.volume import VolumeNetwork, pad_to_multiple
from tests.meningioma.networks.small import SMALL, dagunet, varied
from tests.meningioma.networks.spheres import learnt_dice

Build = Callable[..., VolumeNetwork]


NETWORKS = pytest.mark.parametrize("build", [AGUNet, DAUNet, dagunet])


@pytest.mark.parametrize(
    ("build", "millions"), [(AGUNet, 18.66), (DAUNet, 25.80), (dagunet, 31.04)], ids=["agunet", "daunet", "dagunet"]
)
def test_the_published_networks_have_as_many_parameters_as_published(build: Build, millions: float) -> None:
    with torch.device("meta"):
        network = build()
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@NETWORKS
@pytest.mark.parametrize("size", [(12, 12, 12), (9, 13, 18), (10, 9, 21)], ids=str)
def test_any_size_from_the_smallest_gives_logits_of_its_own_size(build: Build, size: tuple[int, ...]) -> None:
    network = build(filters=SMALL, classes=3, in_channels=2).eval()
    x = torch.randn(2, 2, *size)
    levels = network.forward_levels(x)
    assert [tuple(level.shape) for level in levels] == [(2, 3, *size), (2, 3, *(-(-side // 2) for side in size))]
    assert torch.equal(network(x), levels[0])


@NETWORKS
def test_an_empty_batch_gives_no_logits(build: Build) -> None:
    network = build(filters=SMALL).eval()
    assert [tuple(level.shape) for level in network.forward_levels(torch.zeros(0, 1, 9, 10, 11))] == [
        (0, 2, 9, 10, 11),
        (0, 2, 5, 5, 6),
    ]


def test_padding_repeats_the_last_plane_and_the_rest_is_computed_as_without_it() -> None:
    network = varied(AGUNet(filters=SMALL)).eval()
    x = torch.randn(1, 1, 12, 11, 14)
    padded = torch.cat([x, x[:, :, :, -1:]], 3)
    padded = torch.cat([padded, padded[..., -1:], padded[..., -1:]], 4)
    assert torch.equal(pad_to_multiple(x, (4, 4, 4)), padded)
    assert torch.equal(network(x), network(padded)[:, :, :, :11, :14])


@pytest.mark.parametrize(("filters", "smallest"), [((4, 8), 5), ((4, 6, 8), 9), ((2, 2, 2, 2), 17)])
def test_an_axis_that_is_too_small_is_named_with_the_smallest_that_works(
    filters: tuple[int, ...], smallest: int
) -> None:
    network = AGUNet(filters=filters).eval()
    network(torch.zeros(1, 1, smallest, smallest, smallest + 1))
    with pytest.raises(InputError, match=rf"axis 1 of the volume has {smallest - 1} voxels.*works is {smallest}\."):
        network(torch.zeros(1, 1, smallest, smallest - 1, smallest))


@pytest.mark.parametrize("shape", [(1, 2, 12, 12, 12), (1, 12, 12, 12), (1, 1, 1, 12, 12, 12)], ids=str)
def test_volumes_of_other_channels_or_axes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"takes volumes \(B, 1, D, H, W\); got"):
        AGUNet(filters=SMALL)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"filters": (8,)}, "at least two levels"),
        ({"filters": (8, 0)}, "positive numbers"),
        ({"classes": 1}, "classes=1 at least 2"),
        ({"dropout": 1.5}, r"dropout=1\.5 must be from 0 to 1"),
    ],
)
def test_impossible_parameters_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        AGUNet(**options)


@NETWORKS
def test_gradients_reach_every_parameter(build: Build) -> None:
    network = varied(build(filters=SMALL)).train()
    sum(level.square().sum() for level in network.forward_levels(torch.randn(2, 1, 12, 9, 13))).backward()  # type: ignore[union-attr]
    # What a batch normalisation follows needs no bias, and gets a gradient of rounding alone.
    untouched = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


def test_the_projections_of_the_position_attention_are_parameters_and_learn() -> None:
    network = varied(DAUNet(filters=SMALL)).train()
    network(torch.randn(2, 1, 12, 12, 12)).square().sum().backward()
    qkv = network.get_parameter("dual.position.attention.qkv.weight")
    assert qkv.grad is not None and qkv.grad.abs().max() > 1e-6
    assert "dual.position.attention.qkv.weight" in network.state_dict()


SWITCHES = [
    (AGUNet, {"input_pyramid": False}, ".pyramid."),
    (AGUNet, {"gate": False}, ".gate."),
    (AGUNet, {"deep_supervision": False}, "decoder.heads.1."),
    (DAUNet, {"position": False}, "dual.position."),
    (DAUNet, {"channel": False}, "dual.channel."),
    (DAUNet, {"position": False, "channel": False}, "dual."),
    (dagunet, {"guided": False}, ".guide."),
]


@pytest.mark.parametrize(
    ("build", "option", "part"), SWITCHES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_each_switch_takes_away_its_own_part_alone(build: Build, option: dict[str, Any], part: str) -> None:
    if "guided" in option:
        build, whole = DAUNet, dagunet(filters=SMALL)
    else:
        whole = build(filters=SMALL)
    without = build(filters=SMALL, **option)
    gone = whole.state_dict().keys() - without.state_dict().keys()
    assert gone and all(part in key for key in gone)
    assert not without.state_dict().keys() - whole.state_dict().keys()
    x = torch.randn(1, 1, 12, 9, 10)
    assert len(without.eval().forward_levels(x)) == (1 if "deep_supervision" in option else 2)
    assert without(x).shape == whole.eval()(x).shape


def test_dropout_drops_whole_channels_while_training_only() -> None:
    block = ConvBlock(1, 64, dropout=0.5)
    out = block.train()(torch.randn(1, 1, 6, 6, 6))
    dropped = (out.flatten(2) == 0).all(-1).float().mean().item()
    assert 0.3 < dropped < 0.7
    x = torch.randn(1, 1, 6, 6, 6)
    assert torch.equal(block.eval()(x), block(x))
    with torch.device("meta"):
        assert any(isinstance(m, nn.Dropout3d) for m in AGUNet(dropout=0.2).modules())
        assert not any(isinstance(m, nn.Dropout3d) for m in AGUNet().modules())


def test_dropout_around_the_attention_is_on_by_default_and_can_be_switched_off() -> None:
    x = torch.randn(1, 1, 12, 12, 12)
    network = DAUNet(filters=SMALL).train()
    assert not torch.equal(network(x), network(x))
    network = DAUNet(filters=SMALL, attention_dropout=0.0).train()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("stride", [2, 3, 4, 5])
def test_an_up_convolution_is_the_full_one_cut_or_filled_at_the_end(stride: int) -> None:
    layer = UpConv(3, 2, stride)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 4, 2, 3)
    full = F.conv_transpose3d(x, layer.weight, stride=stride)
    expected = torch.zeros(2, 2, *(side * stride for side in x.shape[2:]))
    kept = [slice(0, min(side * stride, length)) for side, length in zip(x.shape[2:], full.shape[2:], strict=True)]
    expected[:, :, *kept] = full[:, :, *kept]
    torch.testing.assert_close(layer(x), expected + layer.bias[:, None, None, None])


def test_an_up_convolution_needs_a_stride() -> None:
    with pytest.raises(InputError, match="stride=1 must be at least 2"):
        UpConv(3, 2, stride=1)


def test_folded_batch_normalisation_is_the_batch_normalisation() -> None:
    block, up, norm = ConvBlock(3, 5), UpConv(5, 4), batch_norm(4)
    varied(nn.ModuleList([block, norm])).eval()
    x = torch.randn(2, 3, 5, 4, 3)
    expected = F.relu(block.norm2(block.conv2(F.relu(block.norm1(block.conv1(x))))))
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(up_norm(expected, up, norm), norm(up(expected)))


@NETWORKS
def test_a_state_dict_goes_around(build: Build) -> None:
    network = varied(build(filters=SMALL)).eval()
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other = build(filters=SMALL).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(1, 1, 9, 12, 10)
    assert torch.equal(network(x), other(x))
    assert torch.equal(network(x), copy.deepcopy(network)(x))


@NETWORKS
def test_bfloat16_autocast_is_finite_and_near(build: Build) -> None:
    network = varied(build(filters=SMALL))
    x = torch.randn(2, 1, 12, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        network.train().forward_levels(x)[0].float().square().mean().backward()
        low = network.eval()(x)
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    high = network(x)
    assert (low - high).abs().max() < 0.1 * high.abs().max()


@NETWORKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_whole_network_can_be_of_another_precision(build: Build, dtype: torch.dtype) -> None:
    network = varied(build(filters=SMALL)).eval()
    x = torch.randn(1, 1, 12, 9, 13)
    expected = network(x)
    out = network.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert (out - expected).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-5) * expected.abs().max()


def test_the_network_compiles_without_a_break() -> None:
    network = varied(AGUNet(filters=SMALL)).eval()
    x = torch.randn(1, 1, 12, 9, 13)
    torch.testing.assert_close(torch.compile(network, backend="aot_eager", fullgraph=True)(x), network(x))


@NETWORKS
def test_the_network_can_be_exported(build: Build) -> None:
    network = varied(build(filters=SMALL)).eval()
    x = torch.randn(1, 1, 12, 9, 13)
    exported = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(exported(x), network(x))


def test_position_attention_needs_memory_in_proportion_to_the_places() -> None:
    module = PositionAttention(16, form="daunet")
    nn.init.ones_(module.gamma)

    def needed(side: int) -> int:
        x = torch.randn(1, 16, side, side, side, requires_grad=True)
        found = peak_memory(lambda: module(x).sum().backward(), torch.device("cpu"))
        return found if found is not None else pytest.skip("the profiler does not say")

    small, large = needed(8), needed(16)
    places = 16**3
    assert large < places**2 * 4 / 8  # one matrix of weights would be places squared
    assert large / small < 12  # eight times the places


def test_the_same_seed_starts_the_same_network() -> None:
    networks = []
    for _ in range(2):
        torch.manual_seed(3)
        networks.append(DAUNet(filters=SMALL).state_dict())
    assert all(torch.equal(value, networks[1][key]) for key, value in networks[0].items())


@NETWORKS
def test_a_small_network_learns_spheres(build: Build) -> None:
    assert learnt_dice(build(filters=(8, 12, 16)), steps=25) > 0.9
