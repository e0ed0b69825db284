"""Packed attention beside a padded batch, a block-diagonal mask, nested tensors and PyTorch's own packed attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kernels.measure import Case, Contestant
from kernels.varlen_attention import varlen_attention

UNEVEN = (40, 80, 160, 240, 320, 480, 680, 1000)
# A mask with more entries than this takes gigabytes.
_LARGEST_MASK = 1 << 28


def cases(device: torch.device) -> Iterator[Case]:
    """Eight sequences of very different length; on a GPU also many more tokens."""
    yield _case("8 sequences, 3,000 tokens", UNEVEN, 8, 64, torch.float32, device)
    if device.type == "cuda":
        for dtype in (torch.bfloat16, torch.float32):
            yield _case("64 sequences, 24,000 tokens", UNEVEN * 8, 8, 64, dtype, device)
            yield _case("16 sequences, 60,000 tokens", [10 * n for n in UNEVEN] * 2, 8, 128, dtype, device)


def _case(name: str, lengths: Sequence[int], heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = (torch.randn(total, heads, width, device=device).to(dtype).requires_grad_() for _ in range(3))
    cuts = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    runs = {
        "fovea": lambda: varlen_attention(q, k, v, cuts, cuts)[0],
        "each sequence in a loop": lambda: _loop(q, k, v, lengths),
        "padded batch": lambda: _padded(q, k, v, lengths),
        "block-diagonal mask": lambda: _masked(q, k, v, lengths),
        "nested jagged tensors": lambda: _nested(q, k, v, cuts),
        "torch varlen_attn": lambda: _packed(q, k, v, cuts, max(lengths)),
    }
    absent = {"torch varlen_attn": _why_no_packed(q)}
    if total**2 > _LARGEST_MASK:
        absent["block-diagonal mask"] = f"a mask of {total} x {total} takes gigabytes"
    return Case(
        f"{name}, H={heads} D={width}, {str(dtype).removeprefix('torch.')}",
        [Contestant(n, run, [q, k, v], absent.get(n, "")) for n, run in runs.items()],
        baseline="each sequence in a loop",
        flops=4 * heads * width * sum(n * n for n in lengths),
        bytes=4 * q.numel() * q.element_size(),
        tolerance=2e-3 if dtype == torch.float32 else 3e-2,
    )


def _loop(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    own = zip(*(t.transpose(0, 1)[None].split(list(lengths), 2) for t in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(a, b, c)[0].transpose(0, 1) for a, b, c in own])


def _padded(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    a, b, c = (pad_sequence(list(t.split(list(lengths))), batch_first=True).transpose(1, 2) for t in (q, k, v))
    inside = torch.arange(max(lengths), device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
    return F.scaled_dot_product_attention(a, b, c, attn_mask=inside[:, None, None]).transpose(1, 2)[inside]


def _masked(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(q.device)
    a, b, c = (t.transpose(0, 1)[None] for t in (q, k, v))
    same = (ids[:, None] == ids)[None, None]
    return F.scaled_dot_product_attention(a, b, c, attn_mask=same)[0].transpose(0, 1)


def _nested(q: Tensor, k: Tensor, v: Tensor, cuts: Tensor) -> Tensor:
    a, b, c = (torch.nested.nested_tensor_from_jagged(t, cuts.long()).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(a, b, c).transpose(1, 2).values()


def _packed(q: Tensor, k: Tensor, v: Tensor, cuts: Tensor, longest: int) -> Tensor:
    attend: Callable[..., Tensor] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return attend(q, k, v, cuts, cuts, longest, longest)


def _why_no_packed(q: Tensor) -> str:
    try:
        importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return "this PyTorch has none"
    if q.device.type != "cuda":
        return "GPUs only"
    return "half precision only" if q.dtype == torch.float32 else ""
