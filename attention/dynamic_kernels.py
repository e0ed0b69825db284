"""Kernels that every token makes for itself out of its affinity with the regions of a map (ContMix).

Source: Lou and Yu, OverLoCK, CVPR 2025, arXiv 2502.20087. Functions without parameters, on maps (B, C, H, W), so that
blocks which take queries, keys and values from different maps can share them. Masks are (B, H, W), true for real
tokens, and masked tokens of the maps are 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.conv_norm import wide
from kernels.dynamic_conv import dynamic_conv, neighborhood_qk

_FAR = 1000.0  # less than any difference of scores that matters


def fitting_size(size: tuple[int, int], kernel_size: int) -> tuple[int, int]:
    """The size at which a map is mixed: its shorter side is at least the kernel's."""
    short, long = min(size), max(size)
    if short >= kernel_size:
        return size
    stretched = kernel_size if short == long else max(int(kernel_size / short * long), kernel_size)
    return (kernel_size, stretched) if size[0] == short else (stretched, kernel_size)


def resize(x: Tensor, mask: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Bilinear resizing of the real tokens; a token of the result is real where any real one takes part in it."""
    if size == x.shape[2:]:
        return x, mask
    out = F.interpolate(x, size, mode="bilinear", align_corners=False)
    if mask is None:
        return out, None
    share = F.interpolate(mask[:, None].to(x.dtype), size, mode="bilinear", align_corners=False)
    return _per_share(out, share), share[:, 0] > 0


def average(x: Tensor, mask: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Adaptive average of the real tokens; a cell is real where any real token is in it, and 0 otherwise."""
    out = F.adaptive_avg_pool2d(x, size)
    if mask is None:
        return out, None
    share = F.adaptive_avg_pool2d(mask[:, None].to(x.dtype), size)
    return _per_share(out, share), share[:, 0] > 0


def _per_share(sums: Tensor, share: Tensor) -> Tensor:
    return sums / share.masked_fill(share == 0, 1)


def kernel_logits(q: Tensor, keys: Tensor, weight: Tensor, bias: Tensor, groups: int, scale: float) -> Tensor:
    """Logits of every token's kernel: affinities with the regions, projected to taps.

    The projection applies to the regions' keys, which are few, and not to the affinities of every token.

    Args:
        q: (B, C', H, W).
        keys: (B, C', h, w) for L = h w regions.
        weight: (P, L), or (P, L, 1, 1), the projection from regions to taps.
        bias: (P,).
        groups: G, into which the channels fall.
        scale: of the affinities.

    Returns:
        (B, G, H, W, P).
    """
    rows = q.movedim(1, -1).flatten(1, 2).unflatten(-1, (groups, -1)).transpose(1, 2)
    taps = (keys.flatten(2).unflatten(1, (groups, -1)) * scale) @ weight.flatten(1).mT
    return (rows @ taps + bias).unflatten(2, q.shape[2:])


def relative_bias(table: Tensor, size: tuple[int, int]) -> Tensor:
    """(G, 2 k - 1, 2 k - 1) biases by offset as (G, H, W, k k), for windows shifted inwards at borders."""
    kernel = (table.shape[-1] + 1) // 2
    rows, columns = (_offsets(length, kernel, table.device) for length in size)
    index = rows[:, None, :, None] * table.shape[-1] + columns[None, :, None, :]
    return table.flatten(1).index_select(1, index.flatten()).unflatten(1, (*size, kernel**2))


def _offsets(length: int, kernel: int, device: torch.device) -> Tensor:
    """(L, k): place in the table of each tap of each token of an axis."""
    places = torch.arange(length, device=device)
    start = (places - kernel // 2).clamp(0, length - kernel)
    return start[:, None] - places[:, None] + torch.arange(kernel, device=device) + kernel - 1


def apply_kernels(value: Tensor, logits: Tensor, table: Tensor, mask: Tensor | None) -> Tensor:
    """Weighted sums of windows of ``value``, with the softmax of logits plus biases by offset as weights.

    Args:
        value: (B, C, H, W).
        logits: (B, G, H, W, k k); group g weighs channels g C / G to (g + 1) C / G - 1.
        table: (G, 2 k - 1, 2 k - 1).
        mask: masked tokens have no weight for real ones.
    """
    kernel = (table.shape[-1] + 1) // 2
    height, width = value.shape[2:]
    scores = wide(logits) + relative_bias(table, (height, width))
    if mask is not None:
        ones = torch.ones_like(mask, dtype=scores.dtype)[:, None, ..., None]
        hidden = ones.masked_fill(mask[:, None, ..., None], 0) * -_FAR
        scores = scores + neighborhood_qk(ones, hidden, kernel, scale=1.0)
    return dynamic_conv(value, scores.softmax(-1).to(value.dtype), kernel)
