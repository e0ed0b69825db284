"""QTSeg: the published formulation and its cost, released names, any backbone, any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import backbones
from kernels.errors import InputError
from tasks.qtseg.networks import mask_decoder
from tasks.qtseg.networks.build import build_network
from tasks.qtseg.networks.mask_decoder import CellUp, MaskDecoder, TokenMlps
from tasks.qtseg.networks.qtseg import QTSeg
from tests.qtseg.networks.released import released
from tests.qtseg.networks.small import ODD, QTSEG, build, images, released_keys, unreached


@pytest.fixture(scope="module")
def full_size() -> Any:
    with torch.device("meta"):
        return QTSeg(backbones.create("qtseg_encoder", features_only=True)).requires_grad_(False).eval()


def test_the_published_size_and_no_more_than_the_published_cost(full_size: Any) -> None:
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    assert round(count(full_size), 3) == 9.215
    parts = full_size.encoder, full_size.bridge, full_size.decoder
    assert [round(count(part), 2) for part in parts] == [2.26, 0.28, 6.68]
    x = torch.empty(1, 3, 512, 512, device="meta")
    costs = []
    for run in (released(full_size), full_size):
        with FlopCounterMode(display=False) as counter:
            assert run(x).shape == (1, 2, 512, 512)
        costs.append(counter.get_total_flops() / 2e9)
    assert costs[0] == pytest.approx(2.56, rel=0.01)
    assert costs[1] < 0.9 * costs[0]


def test_every_released_name_finds_its_place(full_size: Any) -> None:
    official = released_keys("qtseg_default_2_classes")
    older = {key.replace("bridge.", "mlff."): value for key, value in official.items()}
    own = {key: value.shape for key, value in full_size.state_dict().items()}
    for state in (official, older, {f"module.{key}": value for key, value in official.items()}):
        assert {key: value.shape for key, value in QTSeg.checkpoint_filter(state).items()} == own
    assert QTSeg.checkpoint_filter(full_size.state_dict()).keys() == own.keys()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("size", "classes"), [((64, 96), 2), ((32, 32), 3)], ids=str)
def test_it_is_the_published_formulation_with_its_gradients(
    training: bool, size: tuple[int, int], classes: int
) -> None:
    network: Any = build(QTSEG, classes=classes).double().train(training)
    x = images(size).double()
    found = []
    for run in (network, released(network)):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        found.append((out, torch.autograd.grad(out.square().sum(), [leaf, *network.parameters()])))
    torch.testing.assert_close(found[0][0], found[1][0])
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8 * max(1.0, theirs.abs().max().item()))


def test_an_image_of_any_size_has_logits_of_its_size() -> None:
    network = build(QTSEG, classes=4, in_channels=1).eval()
    for size in (ODD, (33, 32), (64, 50)):
        x = images(size, channels=1)
        logits, features = network.features(x)  # type: ignore[operator]
        assert logits.shape == (2, 4, *size) and features.shape == (2, 16, *(-(-n // 8) * 4 for n in size))
        torch.testing.assert_close(network(x), logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network(x[:1]), logits[:1], rtol=1e-4, atol=1e-5)


def test_what_lies_beyond_the_image_changes_no_more_than_its_border() -> None:
    network = build(QTSEG).eval()
    network.requires_grad_(False)
    x = images((64, 64))
    whole, part = network(x), network(x[:, :, :57, :61])
    assert part.shape[2:] == (57, 61)
    assert (part - whole[:, :, :57, :61]).abs().mean() < whole.abs().mean()


@pytest.mark.parametrize(
    "backbone",
    ["qtseg_encoder", "biformer_tiny", "dinat_mini", "maxvit_pico_rw_256", "resnet18", "vit_tiny_patch16_224"],
)
def test_any_backbone_is_an_encoder_whose_every_parameter_learns(backbone: str) -> None:
    network: Any = build(QTSEG, backbone, classes=3, in_channels=1)
    logits = network(images(ODD, channels=1))
    assert logits.shape == (2, 3, *ODD)
    logits.square().mean().backward()
    assert unreached(network) == []
    assert (network.fine is not None) == (4 in network.encoder.strides)


def test_half_precision_stays_finite() -> None:
    network = build(QTSEG)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images((64, 64)))
    logits.float().square().mean().backward()
    assert logits.isfinite().all() and unreached(network) == []


@pytest.mark.slow
def test_the_network_compiles_to_one_graph() -> None:
    network = build(QTSEG | {"depths": [1, 1, 1]}).eval()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), network(images()), rtol=1e-4, atol=1e-5)


def test_a_map_of_stride_4_enters_half_way() -> None:
    decoder = MaskDecoder(2, 4, (1, 1, 1), 4, 8).eval()
    levels = [torch.randn(1, 16 * 2**i, -(-5 // 2**i), -(-7 // 2**i)) for i in range(3)]
    fine = torch.zeros(1, 8, 9, 14)
    with torch.no_grad():
        plain = decoder(levels)
        torch.testing.assert_close(decoder(levels, fine), plain)
        fine[:, :, 3, 6] = 1.0
        changed = (decoder(levels, fine) - plain).abs().sum((0, 1)) > 0
    rows, columns = changed.nonzero().T
    assert plain.shape == (1, 2, 20, 28) and changed.any()
    assert rows.unique().tolist() == [6, 7] and columns.unique().tolist() == [12, 13]


@pytest.mark.parametrize("backbone", ["qtseg_encoder", "resnet18"])
def test_the_widest_map_may_be_made_in_blocks(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(QTSEG, backbone).eval()
    with torch.no_grad():
        whole = network(images())
        monkeypatch.setattr(mask_decoder, "_BLOCK", 1)
        torch.testing.assert_close(network(images()), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network(images()), whole, rtol=1e-5, atol=1e-6)


def test_a_transposed_convolution_is_a_linear_layer_on_cells() -> None:
    up = CellUp(6, 4)
    x = torch.randn(2, 3, 5, 6)
    whole = torch.nn.functional.conv_transpose2d(x.movedim(-1, 1), up.weight, up.bias, 2).movedim(1, -1)
    cells = torch.nn.functional.gelu(up.norm(whole)).unflatten(1, (3, 2)).unflatten(3, (5, 2))
    torch.testing.assert_close(up(x), cells.transpose(2, 3), rtol=1e-5, atol=1e-6)


def test_each_class_has_an_mlp_of_its_own() -> None:
    mlps = TokenMlps(3, 4, 5)
    x = torch.randn(2, 3, 4)
    changed = x.clone()
    changed[:, 1] += 1
    assert ((mlps(x) - mlps(changed)).abs().sum((0, 2)) > 0).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"num_heads": 3}, "num_heads=3 must divide 8"),
        ({"depths": [1, 2]}, "three numbers"),
        ({"width": 0}, "width=0"),
        ({"mlp_dim": 0}, "mlp_dim=0"),
    ],
    ids=str,
)
def test_impossible_numbers_are_said_in_one_sentence(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_network({"decoder": QTSEG | params, "backbone": {"name": "resnet18"}})
