"""Small volumes with a bright sphere each, which any segmentation network has to learn."""

from __future__ import annotations

import torch
from torch import Tensor


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


def dice(logits: Tensor, masks: Tensor) -> float:
    """Overlap of the predicted structure with the mask, over all volumes together."""
    predicted = logits.argmax(1)
    return (2 * (predicted * masks).sum() / (predicted.sum() + masks.sum())).item()
