"""Windowed products beside the formulations that released models fall back on.

ContMix without NATTEN unfolds the windows inside the map and repeats the outermost ones, which keeps K K copies of the
values. The other peers gather the windows, and add up shifted maps tap by tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dynamic_conv import dynamic_conv, neighborhood_av, neighborhood_qk, outlook
from kernels.dynamic_conv.taps import taps
from kernels.measure import Case, Contestant

HEAD = 16  # channels of a group, as in OverLoCK-T and most of its sizes


def cases(device: torch.device) -> Iterator[Case]:
    """ContMix' kernels on its maps, the two halves of neighbourhood attention, MSA-Conv and outlook attention."""
    if device.type == "cpu":
        yield _contmix(device, torch.float32, 1, 8, 28, 17)
        yield _contmix(device, torch.float32, 1, 8, 28, 5)
        yield _contmix(device, torch.float32, 1, 16, 14, 13)
        yield _contmix(device, torch.float32, 1, 4, 56, 7)
        yield _contmix(device, torch.float32, 1, 16, 7, 7)
        yield _contmix(device, torch.float32, 1, 4, 28, 17, head=64)
        yield _contmix(device, torch.float32, 1, 8, 28, 5, padding="zero")
        yield _logits(device, torch.float32, 1, 4, 56, 7)
        yield _outlook(device, torch.float32, 1, 6, 28)
        return
    for dtype in (torch.bfloat16, torch.float32):
        yield _contmix(device, dtype, 64, 8, 28, 17)
        yield _contmix(device, dtype, 64, 8, 28, 5)
        yield _contmix(device, dtype, 64, 16, 14, 13)
        yield _contmix(device, dtype, 16, 4, 56, 7)
        yield _contmix(device, dtype, 64, 8, 28, 5, padding="zero")
        yield _logits(device, dtype, 16, 4, 56, 7)
        yield _outlook(device, dtype, 64, 6, 28)


def _contmix(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    groups: int,
    side: int,
    kernel: int,
    head: int = HEAD,
    padding: str = "shift",
) -> Case:
    value = torch.randn(batch, groups * head, side, side, device=device).to(dtype).requires_grad_()
    weights = torch.randn(batch, groups, side, side, kernel**2, device=device).softmax(-1).to(dtype).requires_grad_()
    leaves = [value, weights]
    index = taps((side, side), kernel, 1, padding).index().to(device)
    peers: dict[str, Callable[[], Tensor]] = {
        "unfold + einsum": lambda: _unfold(value, weights, kernel, padding),
        "gather + einsum": lambda: _gather(value, weights, index, padding, kernel),
    }
    if padding == "zero":
        peers["shifted maps"] = lambda: _shifted(value, weights, kernel)
    peers["fovea"] = lambda: dynamic_conv(value, weights, kernel, padding=padding)
    tokens = batch * side**2
    return Case(
        f"{kernel}x{kernel} on {side}x{side}, B{batch} G{groups} D{head}, {padding}, {_name(dtype)}",
        [Contestant(name, run, leaves) for name, run in peers.items()],
        "unfold + einsum",
        2.0 * tokens * groups * head * kernel**2,
        float((2 * value.numel() + weights.numel()) * value.element_size()),
        tolerance=2e-3 if dtype == torch.float32 else 5e-2,
    )


def _unfold(value: Tensor, weights: Tensor, kernel: int, padding: str) -> Tensor:
    batch, channels, height, width = value.shape
    half = kernel // 2
    seen = F.unfold(value, kernel, padding=half if padding == "zero" else 0)
    if padding == "shift":
        seen = seen.view(batch, -1, height - kernel + 1, width - kernel + 1)
        seen = F.pad(seen, (half,) * 4, mode="replicate")
    seen = seen.reshape(batch, weights.shape[1], -1, kernel**2, height, width)
    return torch.einsum("bghwk,bgckhw->bgchw", weights, seen).reshape(batch, channels, height, width)


def _gather(value: Tensor, weights: Tensor, index: Tensor, padding: str, kernel: int) -> Tensor:
    if padding == "zero":
        value_ = F.pad(value, (kernel // 2,) * 4)
    else:
        value_ = value
    seen = value_.flatten(2).unflatten(1, (weights.shape[1], -1))[..., index]  # (B, G, D, N, P)
    return torch.einsum("bgnk,bgcnk->bgcn", weights.flatten(2, 3), seen).reshape(value.shape)


def _shifted(value: Tensor, weights: Tensor, kernel: int) -> Tensor:
    padded = F.pad(value, (kernel // 2,) * 4).unflatten(1, (weights.shape[1], -1))
    height, width = value.shape[2:]
    out = torch.zeros_like(padded[..., :height, :width])
    for tap in range(kernel**2):
        y, x = divmod(tap, kernel)
        out = out + weights[..., tap].unsqueeze(2) * padded[..., y : y + height, x : x + width]
    return out.flatten(1, 2)


def _logits(device: torch.device, dtype: torch.dtype, batch: int, heads: int, side: int, kernel: int) -> Case:
    """Logits with their table, softmax and weighted sum."""
    q, k, v = (torch.randn(batch, heads, side, side, 32, device=device).to(dtype).requires_grad_() for _ in range(3))
    rpb = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, device=device).to(dtype).requires_grad_()
    where = taps((side, side), kernel, 1, "shift")
    index, relative = where.index().to(device), where.relative().to(device)

    def gathered() -> Tensor:
        keys, values = (t.flatten(2, 3)[:, :, index] for t in (k, v))  # (B, H, N, P, D)
        logits = torch.einsum("bhnd,bhnpd->bhnp", q.flatten(2, 3) * 32**-0.5, keys) + rpb.flatten(1)[:, relative]
        return torch.einsum("bhnp,bhnpd->bhnd", logits.softmax(-1), values).view(q.shape)

    def ours() -> Tensor:
        return neighborhood_av(neighborhood_qk(q, k, kernel, rpb=rpb).softmax(-1), v, kernel)

    leaves = [q, k, v, rpb]
    return Case(
        f"logits, softmax, sum: {kernel}x{kernel} on {side}x{side}, B{batch} H{heads} D32, {_name(dtype)}",
        [Contestant("gather + einsum", gathered, leaves), Contestant("fovea", ours, leaves)],
        "gather + einsum",
        4.0 * q.numel() * kernel**2,
        float(4 * q.numel() * q.element_size()),
        tolerance=2e-3 if dtype == torch.float32 else 5e-2,
    )


def _outlook(device: torch.device, dtype: torch.dtype, batch: int, heads: int, side: int) -> Case:
    """VOLO's first stage: 3 x 3 patches, stride 2."""
    patches = (side - 1) // 2 + 1
    value = torch.randn(batch, heads, side, side, 32, device=device).to(dtype).requires_grad_()
    attn = torch.randn(batch, heads, patches, patches, 9, 9, device=device).softmax(-1).to(dtype).requires_grad_()

    def released() -> Tensor:
        maps = value.permute(0, 1, 4, 2, 3).reshape(batch, heads * 32, side, side)
        seen = F.unfold(maps, 3, padding=1, stride=2).view(batch, heads, 32, 9, patches**2).permute(0, 1, 4, 3, 2)
        mixed = (attn.flatten(2, 3) @ seen).permute(0, 1, 4, 3, 2).reshape(batch, heads * 32 * 9, patches**2)
        folded = F.fold(mixed, (side, side), 3, padding=1, stride=2)
        return folded.view(batch, heads, 32, side, side).permute(0, 1, 3, 4, 2)

    leaves = [value, attn]
    return Case(
        f"outlook 3x3 stride 2 on {side}x{side}, B{batch} H{heads} D32, {_name(dtype)}",
        [
            Contestant("unfold + matmul + fold", released, leaves),
            Contestant("fovea", lambda: outlook(attn, value, 3, stride=2), leaves),
        ],
        "unfold + matmul + fold",
        2.0 * attn.numel() * 32,
        float((2 * value.numel() + attn.numel()) * value.element_size()),
        tolerance=2e-3 if dtype == torch.float32 else 5e-2,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
