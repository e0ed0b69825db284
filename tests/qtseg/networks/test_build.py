"""Networks by name: attention in backbone and decoder, refusals, configurations, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch import Tensor, nn

import attention
from attention.gate import Gate
from kernels.errors import InputError
from tasks.qtseg.networks.build import available_decoders, build_network, check_network
from tasks.qtseg.networks.export import export_onnx
from tests.qtseg.networks.small import ODD, QTSEG, SELF_GUIDED, UNET, build, images, unreached


class Tiny(nn.Module):
    """A network of a user's own."""

    def __init__(self, in_channels: int, classes: int, encoder: Any = None, halves: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.halves = halves
        self.conv = nn.Conv2d(in_channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[..., ::2] if self.halves else x)


OWN = f"{__name__}:Tiny"


@pytest.mark.parametrize("decoder", [QTSEG, UNET, SELF_GUIDED], ids=lambda d: d["name"])
@pytest.mark.parametrize("gate", ["ela", "attention_gate", "dual_position_channel"])
def test_a_gate_goes_into_the_decoder_and_learns(decoder: dict[str, Any], gate: str) -> None:
    params = {"name": gate, **({"variant": "timm"} if gate == "ela" else {})}
    network = build(decoder, "resnet18", attention=params)
    gates = [module for module in network.modules() if isinstance(module, Gate)]
    assert len(gates) in (3, 4)
    network(images((64, 64))).square().mean().backward()
    assert not [name for name in unreached(network) if "gates" in name]


def test_a_gate_on_a_skip_listens_to_the_decoder() -> None:
    network: Any = build(UNET, "resnet18", attention="attention_gate")
    assert [(gate.dim, gate.signal_dim) for gate in network.gates] == [(64, 8), (64, 16), (128, 32), (256, 64)]


@pytest.mark.parametrize("decoder", [QTSEG, UNET], ids=lambda d: d["name"])
def test_a_mixer_replaces_the_backbones_own(decoder: dict[str, Any]) -> None:
    for entry, count in (({"name": "agent"}, 4), ({"name": "agent", "stages": [False, True, None, "mala"]}, 1)):
        network = build(decoder, "metaformer_tiny", attention=entry, size=64)
        found = [module for module in network.modules() if isinstance(module, attention.class_of("agent", "mixer"))]
        assert len(found) == count
        assert network(images()).shape == (2, 2, *ODD)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decoder": "unett"}, "decoder 'unett' is not known. Did you mean 'unet'"),
        ({"decoder": {"name": "unet", "widht": 3}}, "no parameter 'widht'. Did you mean 'width'"),
        ({"decoder": {"width": 3}}, "has no name; take one of"),
        ({"backbone": {"params": {}}}, "has no name"),
        ({"backbone": "resnet81"}, "backbone 'resnet81' is not known"),
        ({"classes": 0}, "classes=0"),
        ({"netwrok": 1}, "setting 'netwrok' is not known"),
        ({"attention": {"name": "abmil"}}, "of kind 'pooling', which has no place.*gates go into the decoder.*ela"),
        ({"attention": {"name": "query_readout"}}, "of kind 'cross'"),
        ({"attention": {"name": "window"}}, "no token mixer that can be replaced.*backbone=metaformer_tiny"),
        ({"attention": {"name": "window"}, "decoder": "unet"}, "no token mixer"),
        ({"attention": {"name": "ela", "stages": [True]}}, "leave stages out"),
        ({"attention": {"name": "agent", "stages": True}, "backbone": "metaformer_tiny"}, "must be a list"),
        ({"attention": {"nmae": "ela"}}, "names no module"),
        ({"decoder": "segresnet", "attention": {"name": "ela"}}, "has no place in this network"),
        ({"decoder": "segresnet", "backbone": "resnet18"}, "encoder of its own, so backbone='resnet18'"),
        ({"decoder": {"name": "attention_unet", "channels": [8]}}, "cannot be built"),
        ({"decoder": {"name": "self_guided", "width": 0}}, "width=0"),
        ({"decoder": {"name": "unet", "depth": 1}}, "depth=1"),
        ({"decoder": "no.such:Class"}, "cannot be imported"),
        ({"decoder": {"name": OWN, "wrong": 1}}, "cannot be built with"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_in_one_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        build_network(settings)
    assert "\n" not in str(caught.value)


def test_a_network_of_ones_own_may_have_any_backbone() -> None:
    network: Any = build_network({"decoder": {"name": OWN}, "backbone": "resnet18", "classes": 3})
    assert network.encoder.strides == (2, 4, 8, 16, 32)
    check_network(network, 3, 3, 32)
    with pytest.raises(InputError, match=r"gives \(1, 3, 32, 16\) for an image"):
        check_network(Tiny(3, 3, halves=True), 3, 3, 32)
    with pytest.raises(InputError, match="does not take images of 16 x 16"):
        check_network(build(UNET, "resnet18"), 3, 2, 16)


def test_every_decoder_has_a_configuration_of_its_defaults() -> None:
    with initialize_config_module("conf", version_base=None):
        for name in available_decoders():
            cfg: Any = OmegaConf.to_container(compose(overrides=[f"+decoder={name}"]).decoder)
            assert cfg["name"] == name
            with torch.device("meta"):
                if name not in ("swin_unetr", "flexible_unet"):  # which MONAI does not build without numbers
                    by_config, by_name = (build_network({"decoder": d, "size": 64}) for d in (cfg, name))
                    assert {k: v.shape for k, v in by_config.state_dict().items()} == {
                        k: v.shape for k, v in by_name.state_dict().items()
                    }


@pytest.mark.slow
def test_the_exported_file_computes_the_same_for_any_batch(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    network = build(QTSEG | {"depths": [1, 1, 1]}, classes=3)
    path = tmp_path / "network.onnx"
    assert export_onnx(network, path, size=(40, 64)) < 1e-4 and network.training
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = images((40, 64), 3)
    (found,) = session.run(["logits"], {"image": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), network.eval()(x), rtol=1e-4, atol=1e-4)
