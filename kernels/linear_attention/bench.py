"""Linear attention beside the formulations of released code: features, rotated copies and sums as separate tensors.

Softmax attention of the same size is timed in a case of its own; it computes something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_attention import channel_attention, flow_attention, linear_attention_2pass
from kernels.measure import Case, Contestant

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: torch.device) -> Iterator[Case]:
    """Stages of pyramid backbones on 224-pixel images; larger batches in bfloat16 on a GPU."""
    on_gpu = device.type == "cuda"
    batch, dtype = (64, torch.bfloat16) if on_gpu else (8, torch.float32)
    for tokens, heads in ((3136, 2), (784, 4), (784, 8)):
        q, k, v = _qkv(batch, tokens, heads, dtype, device)
        turns = torch.rand(tokens, 16, device=device) * 6.3
        table = (turns.cos(), turns.sin())
        wide = tuple(t.repeat_interleave(2, -1)[:, None].to(dtype) for t in table)
        size = f"B{batch} N{tokens} H{heads} D32"
        plain = partial(linear_attention_2pass, feature_map="relu")
        mala = partial(linear_attention_2pass, normaliser="mala", rotary=table)
        yield _case(f"plain {size}", q, k, v, plain, _plain)
        yield _case(f"MALA {size}", q, k, v, mala, partial(_mala, cos=wide[0], sin=wide[1]))
        if tokens == 784 and heads == 4:
            inline = partial(linear_attention_2pass, normaliser="inline", feature_map="identity")
            l2vit = partial(linear_attention_2pass, normaliser="l2vit", feature_map="relu", scale=32**-0.5)
            yield _case(f"InLine {size}", q, k, v, inline, _inline)
            yield _case(f"L2ViT {size}", q, k, v, l2vit, _l2vit)
            yield _case(f"DaViT channels {size}", q, k, v, channel_attention, _channel)
            yield _case(f"flow {size}", q, k, v, flow_attention, _flow)
            yield _case(f"plain beside softmax attention {size}", q, k, v, plain, _softmax, math.inf)
    lengths = [200, 700, 3000, 8000, 16000] if on_gpu else [200, 700, 1500, 4000]
    yield _packed_case(lengths, 8, dtype, device)


def _qkv(batch: int, tokens: int, heads: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Three leaves that lie as a fused projection leaves them."""
    fused = torch.randn(batch, tokens, 3, heads, 32, dtype=dtype, device=device)
    return [t.detach().requires_grad_() for t in fused.unbind(2)]


def _case(name: str, q: Tensor, k: Tensor, v: Tensor, ours: Call, theirs: Call, tolerance: float | None = None) -> Case:
    baseline = "softmax (SDPA)" if theirs is _softmax else "eager"
    default = 2e-3 if q.dtype == torch.float32 else 3e-2
    return Case(
        name,
        [
            Contestant(baseline, lambda: theirs(q, k, v), [q, k, v]),
            Contestant("fovea", lambda: ours(q, k, v), [q, k, v]),
        ],
        baseline,
        flops=4 * q.numel() * v.shape[-1],
        bytes=4 * q.numel() * q.element_size(),
        tolerance=default if tolerance is None else tolerance,
    )


def _packed_case(lengths: list[int], heads: int, dtype: torch.dtype, device: torch.device) -> Case:
    q, k, v = (t[0].detach().requires_grad_() for t in _qkv(1, sum(lengths), heads, dtype, device))
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)

    def loop(*packed: Tensor) -> Tensor:
        parts = zip(*(t.split(lengths) for t in packed), strict=True)
        return torch.cat([_plain(*(t[None] for t in part))[0] for part in parts])

    ours: Any = partial(linear_attention_2pass, feature_map="relu", cu_seqlens=cu)
    return _case(f"packed {lengths} H{heads} D32", q, k, v, ours, loop)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _heads_first(q.relu(), k.relu(), v)
    return _tokens_first(q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT + 1e-6))


def _inline(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _heads_first(q, k, v)
    share = q.shape[-1] ** -0.5 / k.shape[2]
    state = (k * share**0.5).mT @ (v * share**0.5)
    rest = 1 - q @ k.mean(2, keepdim=True).mT * q.shape[-1] ** -0.5
    return _tokens_first(q @ state + rest * v.mean(2, keepdim=True))


def _mala(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    def rotate(x: Tensor) -> Tensor:
        return x * cos[:, 0] + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin[:, 0]

    q, k, v = _heads_first(q, k, v)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    scale = q.shape[-1] ** -0.5
    z = q @ k.mean(2, keepdim=True).mT * scale
    q, k = rotate(q), rotate(k)
    share = (scale / k.shape[2]) ** 0.5
    out = q @ ((k.mT * share) @ (v * share))
    return _tokens_first(out * (1 + 1 / (z + 1e-6)) - z * v.mean(2, keepdim=True))


def _l2vit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _heads_first(q.relu(), k.relu(), v)
    total = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True).clamp_min(100)
    return _tokens_first(q @ (k.mT @ v * q.shape[-1] ** -0.5) / total)


def _channel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _heads_first(q, k * k.shape[-1] ** -0.5, v)
    return _tokens_first(((k.mT @ v).softmax(-1) @ q.mT).mT)


def _flow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def dot(rows: Tensor, sums: Tensor) -> Tensor:
        return torch.einsum("nhld,nhd->nhl", rows + 1e-6, sums + 1e-6)

    q, k, v = _heads_first(q.sigmoid(), k.sigmoid(), v)
    incoming, outgoing = 1 / dot(q, k.sum(2)), 1 / dot(k, q.sum(2))
    conserved_sink = dot(q, (k * outgoing[..., None]).sum(2))
    conserved_source = dot(k, (q * incoming[..., None]).sum(2)).clamp(-1, 1)
    allocation = (conserved_sink * (q.shape[2] / k.shape[2])).sigmoid()
    competition = conserved_source.softmax(-1) * k.shape[2]
    state = k.mT @ (v * competition[..., None])
    return _tokens_first((q * incoming[..., None]) @ state * allocation[..., None])


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _heads_first(q, k, v)
    return _tokens_first(F.scaled_dot_product_attention(q, k, v))
