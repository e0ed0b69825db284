"""The leaky integrate-and-fire neuron of directly trained spiking networks.

At each of T time steps the membrane moves towards its input, ``v += (x - v) / tau``; where it reaches the threshold
the neuron fires a 1 and the membrane falls back to 0. Firing has no derivative, so the backward pass takes that of a
sigmoid of slope ``alpha`` around the threshold; no gradient passes through the reset.

Sources: Neftci et al., Surrogate gradient learning in spiking neural networks, IEEE Signal Processing Magazine 2019,
arXiv:1901.09948; constants as in Fang et al., SpikingJelly, Science Advances 2023, doi:10.1126/sciadv.adi1480.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.errors import InputError

CONSTANT = 0.03
"""A channel is constant whose largest and smallest value differ by less than this share of the normalisation's
sqrt(``eps``), 1e-4: far above rounding, and far below what one spike leaves."""


def spike(membrane: Tensor, threshold: float, alpha: float = 4.0) -> Tensor:
    """1 where the membrane reaches the threshold, 0 elsewhere.

    The gradient is that of ``sigmoid(alpha * (membrane - threshold))``.
    """
    fired = (membrane >= threshold).to(membrane.dtype)
    if not membrane.requires_grad:
        return fired
    smooth = torch.sigmoid(alpha * (membrane - threshold))
    return fired + (smooth - smooth.detach())


def normalise(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch normalisation of (B, C, H, W) that does not amplify gradients where there is nothing to normalise.

    Where no neuron in front of a convolution fires, its channels are constant, and the derivative of their
    normalisation is 1 / sqrt(eps), about 316: that of ``eps`` alone. Layers in a row raise it beyond all numbers. The
    backward pass takes constant channels for ones of variance 1, so that silent neurons can still learn to fire.
    """
    if not (norm.training and x.requires_grad and x.numel()):
        return norm(x)
    values = x.detach()
    spread = values.amax((0, 2, 3), keepdim=True) - values.amin((0, 2, 3), keepdim=True)
    scale = torch.ones_like(spread).masked_fill(spread < CONSTANT * norm.eps**0.5, norm.eps**0.5)
    return norm(_ScaledGradient.apply(x, scale))


class _ScaledGradient(torch.autograd.Function):
    """The identity; gradients are multiplied by ``scale``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradient * scale, None


class LIF(nn.Module):
    """Inputs (T * B, ...), time before batch, to spikes of the same shape; the membrane starts at 0 in every call.

    Args:
        time_steps: T.
        threshold: of the membrane.
        tau: time constant of the membrane, in time steps, at least 1.
        alpha: slope of the surrogate gradient.

    Raises:
        InputError: ``time_steps`` is below 1, or ``tau`` is.
    """

    def __init__(self, time_steps: int = 1, threshold: float = 1.0, tau: float = 2.0, alpha: float = 4.0) -> None:
        super().__init__()
        if time_steps < 1 or tau < 1:
            raise InputError(f"LIF: time_steps={time_steps} and tau={tau} must be at least 1.")
        self.time_steps = time_steps
        self.threshold = threshold
        self.tau = tau
        self.alpha = alpha

    def extra_repr(self) -> str:
        return f"time_steps={self.time_steps}, threshold={self.threshold}, tau={self.tau}"

    def forward(self, x: Tensor) -> Tensor:
        spikes = []
        membrane: Tensor | None = None
        for current in x.unflatten(0, (self.time_steps, -1)).unbind(0):
            membrane = current / self.tau if membrane is None else membrane + (current - membrane) / self.tau
            fired = spike(membrane, self.threshold, self.alpha)
            spikes.append(fired)
            membrane = membrane * (1 - fired.detach())
        return torch.cat(spikes)
