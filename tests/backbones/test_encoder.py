"""Tile encoders: what goes in, what comes out, and that features depend on the tile alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import backbones
from backbones.encoder import Encoder, _resize
from kernels.errors import InputError

NAMES = ["resnet18", "resnet50", "convnext_tiny", "vit_small_patch16_224", "efficientnet_b0", "mobilenetv3_small_100"]


class Doubling(nn.Module):
    """Gives the mean colour twice over; its own preprocessing is part of its description."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0)}

    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3)).repeat(1, 2)


class Oblong(Doubling):
    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 8, 16)}


class Loaded(nn.Module):
    """Brings weights of its own, as a class that reads a file in its constructor would."""

    num_features = 3

    def __init__(self, value: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        assert self.norm.running_mean is not None
        self.norm.running_mean.fill_(value)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(image).mean((2, 3))


class Unsized(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3))


DOUBLING = "tests.backbones.test_encoder:Doubling"


@pytest.fixture(scope="module")
def resnet() -> Encoder:
    return backbones.create_encoder("resnet18")


def random_tiles(count: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 7, 7), generator=generator, dtype=torch.uint8)
    return nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


@pytest.mark.parametrize("name", NAMES)
def test_features_have_the_stated_size_and_tell_tiles_apart(name: str) -> None:
    encoder = backbones.create_encoder(name)
    features = encoder(random_tiles(3, 224))
    assert features.shape == (3, encoder.dim)
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()
    spread = features.std(0).mean() / features.square().mean().sqrt()
    assert spread > 0.02, f"random features of {name} hardly depend on the tile ({spread:.2g})"
    assert 0.1 < features.square().mean().sqrt() < 10
    assert features.mean(1).abs().max() < 5


def test_normalisation_is_that_of_the_model() -> None:
    encoder = backbones.create_encoder(DOUBLING)
    tile = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    tile[:, 0], tile[:, 1], tile[:, 2] = 255, 0, 51
    expected = torch.tensor([[1.0, -1.0, 0.2] * 2])
    torch.testing.assert_close(encoder(tile), expected)
    assert (encoder.input_size, encoder.mean, encoder.std) == (8, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))


def test_a_batch_gives_what_its_tiles_give_one_by_one(resnet: Encoder) -> None:
    tiles = random_tiles(4, 224)
    single = torch.cat([resnet(tile[None]) for tile in tiles])
    torch.testing.assert_close(resnet(tiles), single, rtol=1e-4, atol=1e-5)


def test_the_memory_layout_of_the_tiles_does_not_matter(resnet: Encoder) -> None:
    tiles = random_tiles(2, 224)
    strided = tiles.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(resnet(strided), resnet(tiles))
    assert torch.equal(tiles, random_tiles(2, 224)), "the tiles given must not be changed"


@pytest.mark.parametrize("side", [8, 11, 64])
def test_a_tile_of_one_colour_gives_the_same_features_at_any_size(side: int) -> None:
    encoder = backbones.create_encoder(DOUBLING)
    tile = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, side, side)
    torch.testing.assert_close(encoder(tile), encoder(tile[..., :8, :8]))


def test_resizing_is_the_antialiased_bicubic_of_pillow() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(tile).resize((41, 41), Image.Resampling.BICUBIC))
    got = _resize(torch.from_numpy(tile).permute(2, 0, 1)[None], 41)[0].permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_gigapath_sees_the_centre_of_an_enlarged_tile() -> None:
    tiny = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 48, "num_heads": 2}
    encoder = backbones.create_encoder("gigapath", params=tiny)
    assert encoder.preprocessing.resize == round(32 * 256 / 224)
    tile = torch.zeros(1, 3, 37, 37, dtype=torch.uint8)
    tile[..., 2:34, 2:34] = 255  # what is cut away is black
    torch.testing.assert_close(encoder(tile), encoder(torch.full_like(tile, 255)))


def test_virchow2_puts_the_class_token_before_the_mean_of_the_patches() -> None:
    tiny = {"img_size": 28, "depth": 1, "embed_dim": 32, "num_heads": 2}
    encoder = backbones.create_encoder("virchow2", params=tiny)
    tiles = random_tiles(2, 28)
    tokens = encoder.model.forward_features(encoder.prepare(tiles))  # type: ignore[operator]
    assert tokens.shape == (2, 1 + 4 + 4, 32)
    features = encoder(tiles)
    assert encoder.dim == 64
    assert encoder.centre is not None
    assert encoder.spread is not None
    features = features * encoder.spread + encoder.centre
    torch.testing.assert_close(features[:, :32], tokens[:, 0])
    torch.testing.assert_close(features[:, 32:], tokens[:, 5:].mean(1))


def test_an_encoder_stays_in_evaluation_mode_and_asks_for_no_gradient(resnet: Encoder) -> None:
    resnet.train()
    assert not any(module.training for module in resnet.modules())
    assert not resnet(random_tiles(1, 224)).requires_grad


@pytest.mark.parametrize("tiles", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_other_than_batches_of_uint8_tiles_are_refused(tiles: Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        backbones.create_encoder(DOUBLING)(tiles)


def test_the_seed_decides_the_weights_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = backbones.create_encoder("mobilenetv3_small_100", seed=3)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    again = backbones.create_encoder("mobilenetv3_small_100", seed=3)
    other = backbones.create_encoder("mobilenetv3_small_100", seed=4)
    tiles = random_tiles(2, 224)
    assert torch.equal(first(tiles), again(tiles))
    assert not torch.allclose(first(tiles), other(tiles))
    assert first.weights == "random, seed 3"


def test_the_fingerprint_changes_with_everything_that_changes_features() -> None:
    def fingerprint(name: str = "mobilenetv3_small_100", seed: int = 1, **params: object) -> str:
        return backbones.create_encoder(name, seed=seed, params=params).fingerprint

    prints = [fingerprint(), fingerprint(seed=2), fingerprint("mobilenetv3_small_075"), fingerprint(global_pool="max")]
    assert len(set(prints)) == len(prints)
    assert fingerprint() == prints[0]


def test_other_preprocessing_has_another_fingerprint() -> None:
    tiny = {"patch_size": 16, "depth": 1, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
    one, other = (
        backbones.create_encoder("vit_tiny_patch16_224", params={**tiny, "img_size": size}) for size in (32, 64)
    )
    assert (one.input_size, other.input_size) == (32, 64)
    assert one.fingerprint != other.fingerprint


def test_a_class_of_the_user_keeps_the_weights_it_came_with() -> None:
    first, again, other = (
        backbones.create_encoder("tests.backbones.test_encoder:Loaded", params={"value": value}) for value in (3, 3, 4)
    )
    assert isinstance(first.model, Loaded)
    assert first.model.norm.running_mean is not None
    assert (first.model.norm.running_mean == 3).all()
    assert first.weights == again.weights
    assert first.weights.startswith("as tests.backbones.test_encoder:Loaded is built (sha256 ")
    assert first.weights != other.weights


def test_oblong_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="16 x 8 px"):
        backbones.create_encoder("tests.backbones.test_encoder:Oblong")


def test_a_class_without_a_feature_size_is_refused() -> None:
    with pytest.raises(InputError, match="'num_features'"):
        backbones.create_encoder("tests.backbones.test_encoder:Unsized")


def test_two_sources_of_weights_are_refused() -> None:
    with pytest.raises(InputError, match=r"pretrained=true and checkpoint=w\.safetensors"):
        backbones.create_encoder("resnet18", pretrained=True, checkpoint="w.safetensors")


@pytest.mark.gpu
def test_features_on_the_accelerator_are_those_of_the_cpu(resnet: Encoder) -> None:
    tiles = random_tiles(4, 256)
    expected = resnet(tiles)
    on_gpu = backbones.create_encoder("resnet18").cuda()(tiles.cuda()).cpu()
    torch.testing.assert_close(on_gpu, expected, rtol=2e-2, atol=2e-2)
