"""Outlook attention as a dynamic convolution: its two steps are folded into one window.

Yuan et al., VOLO: Vision Outlooker for Visual Recognition, TPAMI 2022 (arXiv:2106.13112). A patch around every
``stride``-th token mixes its K x K tokens by a (K K) x (K K) matrix, and patches are summed where they overlap. Token
``i`` at place ``p`` of a patch is given token ``i + q - p`` with the weight at (p, q): a window of 2 K - 1 tokens
around ``i``, whose weight at offset ``r`` is the sum over the patches that hold ``i`` of their weights with
``q - p = r``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class FoldWeights(torch.autograd.Function):
    """(B, H, h, w, P, P) weights of patches to (B, H, *grid, (2 K - 1)^2) weights of windows."""

    @staticmethod
    def forward(
        ctx: Any, attn: Tensor, grid: tuple[int, int], kernel: tuple[int, int], stride: int, padding: tuple[int, int]
    ) -> Tensor:
        ctx.settings = (attn.shape[2], attn.shape[3]), grid, kernel, stride, padding
        ctx.shape = attn.shape
        out = attn.new_zeros(*attn.shape[:2], *grid, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
        weights = attn.unflatten(-1, kernel)
        for of_patches, of_windows in _places(*ctx.settings):
            out[of_windows] += weights[of_patches]
        return out.flatten(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel = ctx.settings[2]
        out = grad.new_zeros(ctx.shape)  # a patch's place beyond the grid is dropped and has no gradient
        weights = out.unflatten(-1, kernel)
        windows = grad.unflatten(-1, (2 * kernel[0] - 1, 2 * kernel[1] - 1))
        for of_patches, of_windows in _places(*ctx.settings):
            weights[of_patches] = windows[of_windows]
        return out, None, None, None, None


def _places(
    patches: tuple[int, int], grid: tuple[int, int], kernel: tuple[int, int], stride: int, padding: tuple[int, int]
) -> Iterator[tuple[Any, Any]]:
    """For each place of a patch: the patches whose place is on the grid, and the tokens and offsets it stands for."""
    every = slice(None)
    for place in range(kernel[0] * kernel[1]):
        centres, tokens, offsets = [], [], []
        for axis, p in enumerate(divmod(place, kernel[1])):
            shift = p - padding[axis]
            first = max(-(shift // stride), 0)  # the least patch with patch * stride + shift >= 0
            last = min((grid[axis] - 1 - shift) // stride, patches[axis] - 1)
            centres.append(slice(first, max(last + 1, first)))
            start = first * stride + shift
            tokens.append(slice(start, max(last * stride + shift + 1, start), stride))
            offsets.append(slice(kernel[axis] - 1 - p, 2 * kernel[axis] - 1 - p))
        yield (every, every, *centres, place), (every, every, *tokens, *offsets)
