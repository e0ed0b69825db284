"""Neighbourhood attention beside dense attention under a mask, compiled flex_attention, gathered keys and NATTEN."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.measure import Case, Contestant
from kernels.neighborhood_attention import neighborhood_attention
from kernels.neighborhood_attention.reference import dense_bias
from kernels.windows import Window, axis_neighbours, window, window_mask

DENSE_TOKENS = 16_384  # a mask of every query against every key is kept out of memory beyond
GATHERED_BYTES = 8e9
DENSE = "dense SDPA, mask"


def cases(device: torch.device) -> Iterator[Case]:
    """The shapes of NAT and DiNAT on a CPU; on a GPU larger batches, volumes and a diffusion model's image."""
    if device.type == "cpu":
        yield _case(device, 1, (56, 56), 4, 32, 7)
        yield _case(device, 1, (56, 56), 4, 32, 13, dilation=2)
        yield _case(device, 1, (16, 16, 16), 4, 32, 5)
        yield _case(device, 1, (14, 14), 16, 32, 7)
        yield _case(device, 1, (56, 56), 4, 32, 7, biased=True)
        return
    yield _case(device, 64, (56, 56), 2, 32, 7)
    yield _case(device, 64, (56, 56), 2, 32, 7, biased=True)
    yield _case(device, 64, (14, 14), 8, 32, 7)
    yield _case(device, 4, (256, 256), 2, 32, 13)
    yield _case(device, 2, (32, 32, 32), 4, 32, 5)
    yield _case(device, 1, (256, 256), 24, 128, 80)


def _case(
    device: torch.device,
    batch: int,
    grid: tuple[int, ...],
    heads: int,
    width: int,
    kernel_size: int,
    dilation: int = 1,
    biased: bool = False,
) -> Case:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    frame = window(grid, kernel_size, 1, dilation)
    leaves = [
        torch.randn(batch, *grid, heads, width, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(3)
    ]
    table = torch.randn(heads, *(2 * k - 1 for k in frame.kernel), generator=generator).to(device) if biased else None
    if table is not None:
        leaves.append(table.requires_grad_())
    q, k, v = leaves[:3]
    tokens = math.prod(grid)
    fovea = functools.partial(neighborhood_attention, q, k, v, kernel_size, dilation=dilation, rpb=table)
    pairs = batch * heads * tokens * frame.neighbours
    gathered = 2 * pairs * width * q.element_size()
    too_long = f"a mask of {tokens} x {tokens}" if tokens > DENSE_TOKENS else ""
    contestants = [
        Contestant("fovea", fovea, leaves),
        Contestant(
            DENSE,
            fovea if too_long else _Dense(q, k, v, table, frame).run,
            leaves,
            too_long,
        ),
        Contestant(
            "gather + matmul",
            functools.partial(_gather, q, k, v, table, frame),
            leaves,
            "" if gathered < GATHERED_BYTES else f"{gathered / 1e9:.0f} GB of gathered keys and values",
        ),
        _flex(q, k, v, frame, biased),
        _natten(q, k, v, kernel_size, dilation, biased),
    ]
    shape = "x".join(map(str, grid))
    label = f"{batch} x {shape}, {heads} heads of {width}, kernel {kernel_size}, dilation {dilation}"
    present = [c.name for c in contestants if not c.absent]
    return Case(
        label + (", bias" if biased else ""),
        contestants,
        DENSE if DENSE in present else present[-1],
        flops=4 * pairs * width,
        bytes=4 * q.numel() * q.element_size(),
        tolerance=2e-2 if dtype == torch.bfloat16 else 2e-3,
    )


class _Dense:
    """Every query against every key, what is not seen masked: what is written without a kernel."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, frame: Window) -> None:
        self.tensors, self.table, self.frame = (q, k, v), table, frame
        self.mask = window_mask(frame)[None, None].to(q.device)

    def run(self) -> Tensor:
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in self.tensors)
        mask = self.mask
        if self.table is not None:
            mask = dense_bias(self.table, self.frame)[None].masked_fill(~mask, -torch.inf).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).unflatten(1, self.frame.grid)


@functools.lru_cache(maxsize=2)
def _neighbours(frame: Window, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, prod k) tokens of every window, and (N, prod k) entries of a flattened table."""
    flat = entry = torch.zeros(1, 1, dtype=torch.int64)
    for axis in frame.axes:
        keys = axis_neighbours(axis)
        steps = (keys - torch.arange(axis.length)[:, None]) // axis.dilation + axis.kernel - 1
        flat = (flat[:, None, :, None] * axis.length + keys[None, :, None, :]).flatten(2).flatten(0, 1)
        entry = (entry[:, None, :, None] * (2 * axis.kernel - 1) + steps[None, :, None, :]).flatten(2).flatten(0, 1)
    return flat.to(device), entry.to(device)


def _gather(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, frame: Window) -> Tensor:
    """Each query's own copy of its keys and values."""
    tokens, entries = _neighbours(frame, q.device)
    q_, k_, v_ = (t.flatten(1, -3) for t in (q, k, v))
    scores = torch.einsum("bnhd,bnkhd->bnhk", q_ * q.shape[-1] ** -0.5, k_[:, tokens])
    if table is not None:
        scores = scores + table.flatten(1)[:, entries].transpose(0, 1)
    out = torch.einsum("bnhk,bnkhd->bnhd", scores.softmax(-1).to(v.dtype), v_[:, tokens])
    return out.unflatten(1, frame.grid)


def _flex(q: Tensor, k: Tensor, v: Tensor, frame: Window, biased: bool) -> Contestant:
    """PyTorch's compiled attention with a block mask; it has no backward pass on a CPU."""
    name = "flex_attention compiled"

    def absent(why: str) -> Contestant:
        return Contestant(name, lambda: q, (), why)

    if biased:
        return absent("its form of a learned bias differs too much to compare")
    if any(axis.dilation > 1 for axis in frame.axes) and q.device.type == "cuda" and math.prod(frame.grid) > 65_536:
        return absent("the block mask is dense under dilation")
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            inside = i >= 0
            for axis in reversed(frame.axes):
                x, y, i, j = i % axis.length, j % axis.length, i // axis.length, j // axis.length
                group, place = x % axis.dilation, x // axis.dilation
                length = (axis.length - group + axis.dilation - 1) // axis.dilation
                start = torch.minimum((place - axis.kernel // 2).clamp_min(0), length - axis.kernel)
                key = y // axis.dilation - start
                inside = inside & (y % axis.dilation == group) & (key >= 0) & (key < axis.kernel)
            return inside

        tokens = math.prod(frame.grid)
        blocks = create_block_mask(seen, None, None, tokens, tokens, device=q.device.type)
        compiled = torch.compile(flex_attention)

        if q.device.type == "cpu":
            q, k, v = (t.detach() for t in (q, k, v))

        def run() -> Tensor:
            a, b, c = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))
            return compiled(a, b, c, block_mask=blocks).transpose(1, 2).unflatten(1, frame.grid)

        with torch.no_grad():
            run()
    except Exception as error:  # no C++ compiler, a shape it does not take
        return absent(f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}")
    return Contestant(name, run, (q, k, v) if q.device.type == "cuda" else ())


def _natten(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, dilation: int, biased: bool) -> Contestant:
    if importlib.util.find_spec("natten") is None:
        return Contestant("natten", lambda: q, (), "not installed")
    if biased:
        return Contestant("natten", lambda: q, (), "no relative position bias since 0.20")
    natten = importlib.import_module("natten")

    operator = getattr(natten, f"na{q.dim() - 3}d")
    return Contestant("natten", lambda: operator(q, k, v, kernel_size=kernel_size, dilation=dilation), (q, k, v))
