"""Windowed products by gathering every tap in plain PyTorch: the definition of correct."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dynamic_conv.taps import Taps


def weighted_sum_reference(attn: Tensor, value: Tensor, taps: Taps) -> Tensor:
    """(B, H, *grid, P) and (B, H, *grid, D) to (B, H, *grid, D)."""
    precise = torch.promote_types(value.dtype, torch.float32)
    index = taps.index().to(value.device)
    seen = taps.enlarge(value.to(precise))[:, :, index]  # (B, H, N, P, D)
    out = torch.einsum("bhnp,bhnpd->bhnd", attn.to(precise).flatten(2, -2), seen)
    return out.unflatten(2, taps.grid).to(value.dtype)


def products_reference(q: Tensor, k: Tensor, rpb: Tensor | None, scale: float, taps: Taps) -> Tensor:
    """(B, H, *grid, D) twice to (B, H, *grid, P)."""
    precise = torch.promote_types(q.dtype, torch.float32)
    index = taps.index().to(q.device)
    seen = taps.enlarge(k.to(precise))[:, :, index]
    logits = torch.einsum("bhnd,bhnpd->bhnp", q.to(precise).flatten(2, -2) * scale, seen)
    if rpb is not None:
        logits = logits + rpb.to(precise).flatten(1)[:, taps.relative().to(q.device)]
    return logits.unflatten(2, taps.grid).to(q.dtype)


def outlook_reference(
    attn: Tensor, value: Tensor, kernel: tuple[int, int], stride: int, padding: tuple[int, int]
) -> Tensor:
    """(B, H, h, w, P, P) and (B, H, *grid, D) to (B, H, *grid, D), by unfolding the patches and folding them back."""
    batch, heads, *grid, width = value.shape
    precise = torch.promote_types(value.dtype, torch.float32)
    images = value.to(precise).flatten(0, 1).permute(0, 3, 1, 2)
    patches = F.unfold(images, kernel, padding=padding, stride=stride)  # (B H, D P, h w)
    patches = patches.view(batch * heads, width, -1, patches.shape[2]).permute(0, 3, 2, 1)
    mixed = attn.to(precise).flatten(2, 3).flatten(0, 1) @ patches  # (B H, h w, P, D)
    columns = mixed.permute(0, 3, 2, 1).flatten(1, 2)
    out = F.fold(columns, tuple(grid), kernel, padding=padding, stride=stride)
    return out.permute(0, 2, 3, 1).unflatten(0, (batch, heads)).to(value.dtype)
