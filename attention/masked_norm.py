"""Batch normalisation whose statistics, while training, are those of real tokens alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


def masked_batch_norm(norm: _BatchNorm, x: Tensor, mask: Tensor | None, channel: int = 1) -> Tensor:
    """``norm`` on a map, blind to its masked tokens.

    With a mask, statistics are those of this process, also where ``norm`` synchronises them otherwise.

    Args:
        norm: batch normalisation of any number of axes that fits ``x``.
        x: (B, C, *grid), or (B, *grid, C) with ``channel=-1``.
        mask: (B, *grid) bool, true for real tokens.
        channel: the axis of the channels, 1 or -1.
    """
    if mask is None or not norm.training:
        return norm(x) if channel == 1 else norm(x.flatten(0, -2)).view(x.shape)
    values = x.movedim(channel, -1)
    values = values.to(torch.promote_types(x.dtype, torch.float32))
    hidden = ~mask[..., None]
    axes = tuple(range(x.dim() - 1))
    count = mask.sum()
    mean = values.masked_fill(hidden, 0).sum(axes) / count.clamp_min(1)
    centred = (values - mean).masked_fill(hidden, 0)
    squares = centred.square().sum(axes)
    variance = squares / count.clamp_min(1)
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            momentum = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
            step = momentum * (count > 0)
            # Running statistics hold the unbiased variance, as those of PyTorch do.
            unbiased = squares / (count - 1).clamp_min(1)
            norm.running_mean.add_(step * (mean - norm.running_mean))
            norm.running_var.add_(step * (unbiased - norm.running_var))
    out = centred * (variance + norm.eps).rsqrt() * norm.weight + norm.bias
    return out.to(x.dtype).movedim(-1, channel)
