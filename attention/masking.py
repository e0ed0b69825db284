"""Tokens that are not there: what masks mean, and how operators without a mask argument leave keys out.

A mask is boolean, (B, *grid) or (B, N), true for a real token. Masked tokens contribute to no sum, mean or softmax, and
whatever they hold, NaN included, changes nothing; their own outputs are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Less than any difference of scores that matters, and a power of e that is 0 in every precision.
_FAR = 1000.0


def blank(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` (B, *grid, C) with zeros, not products with zero, where ``mask`` (B, *grid) is false."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """``mask`` (B, *grid) in the form of PyTorch's attention, (B, 1, 1, N).

    An item without any real token sees all of its keys, whose values are 0: its outputs are 0 and not NaN.
    """
    if mask is None:
        return None
    flat = mask.flatten(1)
    return (flat | ~flat.any(1, keepdim=True))[:, None, None]


def hide_keys(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """``q`` and ``k`` (B, *grid, heads, D) with one more channel that moves the scores of masked keys out of reach.

    For operators that take no mask. Where a query sees masked keys alone they have weight, so that values must be 0
    there. Pass the same ``scale`` on to the operator: its default would follow the new width.
    """
    if mask is None:
        return q, k
    shift = torch.zeros_like(k[..., :1]).masked_fill(~mask[..., None, None], -_FAR / scale)
    return torch.cat([q, torch.ones_like(q[..., :1])], -1), torch.cat([k, shift], -1)
