"""Small volumes with a bright sphere each, which any segmentation network has to learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tasks.meningioma.networks.volume import VolumeNetwork


def spheres(count: int, side: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy volumes (N, 1, S, S, S) and masks (N, S, S, S) int64 of spheres of a fifth to a third of the side."""
    generator = torch.Generator().manual_seed(seed)
    centres = side * (0.35 + 0.3 * torch.rand(count, 3, generator=generator))
    radii = side * (0.2 + 0.13 * torch.rand(count, generator=generator))
    axes = torch.arange(side, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(axes, axes, axes, indexing="ij"))
    distance = (grid[None] - centres[:, :, None, None, None]).square().sum(1).sqrt()
    masks = (distance <= radii[:, None, None, None]).long()
    volumes = masks.float() + 0.3 * torch.randn(masks.shape, generator=generator)
    return volumes[:, None], masks


def learnt_dice(network: VolumeNetwork, steps: int, side: int = 16) -> float:
    """Dice on unseen volumes after training at all levels with a soft Dice loss."""
    volumes, masks = spheres(6, side)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(steps):
        losses = [_soft_dice_loss(level, masks) for level in network.train().forward_levels(volumes)]
        optimiser.zero_grad()
        torch.stack(losses).sum().backward()
        optimiser.step()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # so few steps do not fill a mean of momentum 0.99
                module.reset_running_stats()
                module.momentum = None
        for _ in range(2):
            network(volumes)
        unseen, wanted = spheres(3, side, seed=1)
        predicted = network.eval()(unseen).argmax(1)
    return (2 * (predicted * wanted).sum() / (predicted.sum() + wanted.sum())).item()


def _soft_dice_loss(level: Tensor, masks: Tensor) -> Tensor:
    stride = masks.shape[-1] // level.shape[-1]
    wanted = masks[:, ::stride, ::stride, ::stride].float()
    found = level.softmax(1)[:, 1]
    return 1 - (2 * (found * wanted).sum() + 1) / (found.square().sum() + wanted.sum() + 1)
