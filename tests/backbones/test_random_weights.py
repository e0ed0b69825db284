"""Random weights that compute something at a sane scale."""

from __future__ import annotations

import timm
import torch
from torch import nn

from backbones.random_weights import CALIBRATION_IMAGES, coloured_noise, make_useful


def test_calibrated_networks_keep_their_signal() -> None:
    model = timm.create_model("efficientnet_b0", num_classes=0).eval()
    images = coloured_noise(8, 224, torch.Generator().manual_seed(1))

    def prepare(tiles: torch.Tensor) -> torch.Tensor:
        return (tiles / 255 - 0.5) / 0.25

    with torch.no_grad():
        before = model(prepare(images)).std()
        make_useful(model, prepare(coloured_noise(CALIBRATION_IMAGES, 224, torch.Generator().manual_seed(0))))
        after = model(prepare(images)).std()
    assert before < 1e-3
    assert 0.01 < after < 10


def test_batch_statistics_are_those_of_the_calibration_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    images = coloured_noise(8, 32, torch.Generator().manual_seed(0)) / 255
    make_useful(model, images)
    with torch.no_grad():
        seen = model(images)
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)
    assert not model[1].training
    assert model[1].momentum == 0.1


def test_branches_that_start_at_nothing_are_opened() -> None:
    resnet = timm.create_model("resnet18", num_classes=0)
    assert not resnet.layer1[0].bn2.weight.any()
    make_useful(resnet, torch.rand(2, 3, 32, 32))
    assert (resnet.layer1[0].bn2.weight == 1).all()
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, init_values=1e-5, num_classes=0)
    make_useful(vit, torch.rand(1, 3, 224, 224))
    assert (vit.blocks[0].ls1.gamma == 1).all()


def test_noise_is_repeatable_and_covers_the_range() -> None:
    first, again = (coloured_noise(16, 40, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.dtype == torch.uint8
    assert first.shape == (16, 3, 40, 40)
    assert first.float().std() > 40
