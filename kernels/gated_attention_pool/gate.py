"""The gate of the attention score on one piece of rows, forward and backward, in place where it can be.

``gates (n, 2 h)`` hold the tanh and then the sigmoid of each row; ``(n, h)`` the tanh alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def activate(gates: Tensor, width: int) -> Tensor:
    """Put the activations in the place of what comes before them; ``width`` is h."""
    gates[:, :width].tanh_()
    if gates.shape[1] > width:
        gates[:, width:].sigmoid_()
    return gates


def product(gates: Tensor, width: int) -> Tensor:
    """What the score layer sees, (n, h); ``gates`` itself without a sigmoid."""
    return gates[:, :width] * gates[:, width:] if gates.shape[1] > width else gates


def gradient(d_product: Tensor, gates: Tensor, width: int) -> Tensor:
    """Gradient of what comes before the activations, in the shape of ``gates``; overwrites ``d_product``."""
    if gates.shape[1] == width:
        return d_product.sub_(d_product * gates.square())
    tanh, sigmoid = gates[:, :width], gates[:, width:]
    out = torch.empty_like(gates)
    # d tanh = d * sigmoid * (1 - tanh^2); d sigmoid = d * tanh * sigmoid * (1 - sigmoid)
    torch.mul(d_product, sigmoid, out=out[:, :width])
    torch.mul(out[:, :width], tanh, out=out[:, width:])
    out[:, width:].addcmul_(out[:, width:], sigmoid, value=-1)
    out[:, :width].sub_(out[:, :width] * tanh.square())
    return out
