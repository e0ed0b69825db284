"""The table of pathology encoders: every entry builds at its real size and gives the features it states."""

from __future__ import annotations

import re

import pytest
import torch
from hydra import compose, initialize_config_module

import backbones
from backbones.encoder import Encoder, _feature_size, _preprocessing
from backbones.pathology import ENCODERS
from kernels.errors import InputError

# Parameters in millions as the model cards and papers state them.
PARAMETERS = {
    "uni": 303,
    "uni2_h": 681,
    "virchow2": 631,
    "gigapath": 1135,
    "h_optimus_0": 1135,
    "h_optimus_1": 1135,
    "phikon_v2": 303,
    "ctranspath": 28,
    "lunit_dino_vits8": 22,
}
# Encoder dimensions by which features made elsewhere are recognised.
DIMENSIONS = {
    "uni": 1024,
    "uni2_h": 1536,
    "virchow2": 2560,
    "conch_v1_5": 768,
    "gigapath": 1536,
    "h_optimus_0": 1536,
    "h_optimus_1": 1536,
    "phikon_v2": 1024,
    "ctranspath": 768,
    "lunit_dino_vits8": 384,
    "resnet50_clam": 1024,
}
CONFIGURED = [
    "resnet18",
    "resnet50",
    "convnext_tiny",
    "vit_small_patch16_224",
    "efficientnet_b0",
    "mobilenetv3_small_100",
]


@pytest.mark.parametrize("name", ENCODERS)
def test_each_encoder_has_its_published_size_and_features(name: str) -> None:
    """At real size on the meta device, where nothing is allocated or computed but every shape is checked."""
    entry = ENCODERS[name]
    with torch.device("meta"):
        model = backbones.create(name, num_classes=0)
        encoder = Encoder(
            model,
            name=name,
            dim=entry.dim,
            preprocessing=_preprocessing(model, name, {}),
            pooling=entry.pooling,
        )
    side = encoder.input_size
    assert encoder(torch.zeros(2, 3, side, side, dtype=torch.uint8, device="meta")).shape == (2, entry.dim)
    assert DIMENSIONS[name] == entry.dim
    assert _feature_size(model) * (2 if entry.pooling == "class_and_mean" else 1) == entry.dim
    assert (encoder.input_size, encoder.mean, encoder.std) == (entry.input_size, entry.mean, entry.std)
    if name in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], rel=0.02)


@pytest.mark.parametrize("name", ENCODERS)
def test_each_entry_is_complete(name: str) -> None:
    entry = ENCODERS[name]
    assert name == entry.name
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) for hub_id, _ in entry.sources)
    assert entry.input_size % entry.patch == 0
    assert entry.tile >= entry.input_size
    assert entry.licence
    assert re.search(r"20\d\d", entry.paper)


def test_conch_counts_its_class_token_among_those_read_out() -> None:
    params = {"img_size": 32, "depth": 1, "context_dim": 32, "num_heads": 2, "embed_dim": 16}
    model = backbones.create("conch_v1_5", **params).eval()
    tokens = torch.randn(1, 5, 32)
    changed = tokens.clone()
    changed[:, 0] = torch.randn(32)
    assert not torch.allclose(model.forward_head(tokens), model.forward_head(changed))
    shuffled = tokens[:, [3, 0, 4, 1, 2]]
    torch.testing.assert_close(model.forward_head(tokens), model.forward_head(shuffled))


def test_conch_has_no_feature_maps_and_says_so() -> None:
    with pytest.raises(InputError, match="conch_v1_5"), torch.device("meta"):
        backbones.create("conch_v1_5", features_only=True)


@pytest.mark.parametrize("name", [*CONFIGURED, *ENCODERS])
def test_each_configuration_composes_and_names_a_backbone(name: str) -> None:
    with initialize_config_module("conf", version_base=None):
        cfg = compose(overrides=[f"+backbone={name}"]).backbone
    assert dict(cfg) == {"name": name, "pretrained": False, "checkpoint": None, "params": {}}
    assert cfg.name in backbones.available()
