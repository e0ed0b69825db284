"""Random weights whose features are of use: what a network computes before it has learnt anything, at a sane scale.

The usual initialisation is made for training. Residual branches start at (nearly) nothing, and batch normalisation in
evaluation mode divides by the statistics of no data at all, so that signals fade: the features of an untrained
EfficientNet-B0 are of the order of 1e-5. Here every branch counts from the start and the statistics are measured
once on generated images. So are the mean and spread of each feature, which the encoder then takes out, since what all
images have in common is most of an untrained feature and tells nothing. Such features are a fair descriptor of texture,
enough for demonstrations and tests without a download; they are no substitute for trained weights.

Source for the idea: Saxe et al., On random weights and unsupervised feature learning, ICML 2011; data-dependent scales
after Krähenbühl et al., ICLR 2016, arXiv:1511.06856.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

CALIBRATION_IMAGES = 16


@torch.no_grad()
def make_useful(model: nn.Module, images: Tensor) -> None:
    """Open the residual branches of a freshly initialised ``model`` and measure its batch statistics, in place.

    Args:
        images: (B, 3, H, W) calibration images as the model takes them, normalised.
    """
    _open_branches(model)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over what it sees
        norm.train()
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def coloured_noise(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Images (count, 3, side, side) uint8 of noise at several scales around random colours."""
    image = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, side, side).clone()
    for cells in (4, 16, 64):
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        contrast = 0.15 * torch.rand(count, 1, 1, 1, generator=generator)
        image += contrast * F.interpolate(noise, size=(side, side), mode="bilinear", align_corners=False)
    return image.mul_(255).clamp_(0, 255).to(torch.uint8)


def _open_branches(model: nn.Module) -> None:
    """Set to one the last normalisations that start at zero and the layer scales that start near it."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.any():
            nn.init.ones_(module.weight)
        gamma = getattr(module, "gamma", None)
        if isinstance(gamma, nn.Parameter) and gamma.ndim == 1:
            nn.init.ones_(gamma)
