"""Window attention beside the formulation of the released code: copies into windows, dense attention, copies back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.measure import Case, Contestant
from kernels.window_attention import window_attention


@dataclass(frozen=True)
class Problem:
    """One size."""

    batch: int
    side: int
    window: int
    kind: str = "window"
    shift: int = 0
    heads: int = 4
    width: int = 32
    learned: bool = True

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.window}, B{self.batch} {self.side}x{self.side} H{self.heads} D{self.width}, "
            f"{'learned' if self.learned else 'frozen'} bias" + (f", shift {self.shift}" if self.shift else "")
        )


def cases(device: torch.device) -> Iterator[Case]:
    """Sizes of Swin and MaxViT, with the bias trained and frozen."""
    if device.type == "cuda":
        dtype = torch.bfloat16
        problems = [
            Problem(64, 56, 7),
            Problem(64, 56, 7, shift=3),
            Problem(64, 56, 7, kind="grid"),
            Problem(64, 14, 7, heads=16),
            Problem(8, 128, 16),
            Problem(8, 128, 16, learned=False),
            Problem(8, 96, 12, heads=6),
        ]
    else:
        dtype = torch.float32
        problems = [
            Problem(1, 56, 7),
            Problem(8, 56, 7),
            Problem(8, 56, 7, learned=False),
            Problem(2, 56, 7, shift=3),
            Problem(2, 56, 7, kind="grid"),
            Problem(2, 14, 7, heads=16),
            Problem(1, 128, 16),
            Problem(1, 128, 16, learned=False),
        ]
    for problem in problems:
        yield _case(problem, device, dtype)


def _case(problem: Problem, device: torch.device, dtype: torch.dtype) -> Case:
    side, tokens = problem.side, problem.window**2
    shape = (problem.batch, side, side, 3, problem.heads, problem.width)
    qkv = torch.randn(shape, device=device).to(dtype).requires_grad_()
    bias = torch.randn(problem.heads, tokens, tokens, device=device).requires_grad_(problem.learned)
    leaves = [qkv, bias] if problem.learned else [qkv]
    mask = _shift_mask(problem, device)

    def ours() -> Tensor:
        q, k, v = qkv.unbind(3)
        out = window_attention(
            q, k, v, problem.window, kind=problem.kind, shift=problem.shift, bias=bias, shift_mask="released"
        )
        assert isinstance(out, Tensor)
        return out

    number = problem.batch * side**2 * problem.heads
    return Case(
        str(problem),
        [
            Contestant("fovea", ours, leaves),
            Contestant("partition, SDPA", partial(_released, qkv, bias, mask, problem, fused=True), leaves),
            Contestant("partition, matmul", partial(_released, qkv, bias, mask, problem, fused=False), leaves),
        ],
        baseline="partition, SDPA",
        flops=4.0 * number * tokens * problem.width,
        bytes=4.0 * number * problem.width * qkv.element_size() + bias.numel() * 4.0,
        tolerance=2e-2 if dtype == torch.bfloat16 else 2e-3,
    )


def _released(qkv: Tensor, bias: Tensor, mask: Tensor | None, problem: Problem, fused: bool) -> Tensor:
    """Roll, partition, attend with bias and mask, put the windows back, roll back."""
    batch, side = qkv.shape[:2]
    width, count = problem.width, side // problem.window
    if problem.shift:
        qkv = qkv.roll((-problem.shift, -problem.shift), (1, 2))
    if problem.kind == "grid":
        cut = qkv.view(batch, problem.window, count, problem.window, count, -1).permute(0, 2, 4, 1, 3, 5)
    else:
        cut = qkv.view(batch, count, problem.window, count, problem.window, -1).permute(0, 1, 3, 2, 4, 5)
    windows = cut.reshape(-1, problem.window**2, 3, problem.heads, width)
    q, k, v = windows.permute(2, 0, 3, 1, 4)
    added = bias.to(q.dtype)[None]
    if mask is not None:
        added = (added + mask.to(q.dtype)[:, None]).repeat(batch, 1, 1, 1)
    if fused:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
    else:
        out = ((q * width**-0.5) @ k.mT + added).softmax(-1) @ v
    out = out.transpose(1, 2).reshape(batch, count, count, problem.window, problem.window, -1)
    out = out.permute(0, 3, 1, 4, 2, 5) if problem.kind == "grid" else out.permute(0, 1, 3, 2, 4, 5)
    out = out.reshape(batch, side, side, problem.heads, width)
    return out.roll((problem.shift, problem.shift), (1, 2)) if problem.shift else out


def _shift_mask(problem: Problem, device: torch.device) -> Tensor | None:
    """(windows, tokens, tokens): -100 between the regions of a shifted map."""
    if not problem.shift:
        return None
    line = torch.zeros(problem.side, device=device)
    line[-problem.window :] = 1
    line[-problem.shift :] = 2
    count = problem.side // problem.window
    regions = (3 * line[:, None] + line).view(count, problem.window, count, problem.window)
    regions = regions.transpose(1, 2).reshape(count**2, -1)
    return -100.0 * (regions[:, :, None] != regions[:, None])
