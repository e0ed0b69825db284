"""Head by head and Gaussian by Gaussian, the densities multiplied one after the other."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from attention.gaussian_adaptive import GaussianAdaptiveGate, GaussianAdaptiveMixer, GaussianHeads


def released_mixer(module: GaussianAdaptiveMixer) -> Callable[[Tensor], Tensor]:
    axis = 1 if module.axis == "tokens" else 2

    def run(x: Tensor) -> Tensor:
        return _heads(module.heads, x.flatten(1, -2), axis).view(x.shape)

    return run


def released_gate(module: GaussianAdaptiveGate) -> Callable[[Tensor], Tensor]:
    return lambda x: _heads(module.heads, x, 1)


def _heads(heads: GaussianHeads, x: Tensor, axis: int) -> Tensor:
    count, size = heads.num_heads, x.shape[axis] // heads.num_heads
    sizes = [size] * (count - 1) + [x.shape[axis] - size * (count - 1)]
    out = []
    for offsets, widths, part in zip(heads.mean_offsets, heads.c, x.split(sizes, axis), strict=True):
        mean = part.mean(axis, keepdim=True)
        variance = part.var(axis, keepdim=True) + heads.eps
        weights = torch.ones_like(part)
        for offset, c in zip(offsets, widths, strict=True):
            normalised = (part - (mean + offset)) / variance.sqrt()
            weights = weights * torch.exp(-(normalised**2) / (2 * c**2)) / torch.sqrt(2 * math.pi * c**2)
        out.append(part * weights / weights.sum(axis, keepdim=True).clamp(min=heads.eps))
    return torch.cat(out, axis)
