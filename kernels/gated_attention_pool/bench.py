"""Attention pooling beside the ways in which it is usually written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kernels.gated_attention_pool import PoolWeights, gated_attention_pool
from kernels.measure import Case, Contestant
from kernels.segment import segment_ids

MIXED = (200, 400, 800, 1200, 2000, 3000, 4600, 8000)


def cases(device: torch.device) -> Iterator[Case]:
    """Slides of very different size, many small bags, one large slide."""
    settings: list[tuple[str, Sequence[int], int, int, int]] = [
        ("8 bags of 200 to 8,000", MIXED, 512, 128, 1),
        ("8 bags of 200 to 8,000", MIXED, 512, 128, 5),
        ("128 bags of 64", [64] * 128, 512, 128, 5),
        ("1 bag of 20,000", [20_000], 1024, 256, 5),
    ]
    dtypes = [torch.float32]
    if device.type == "cuda":
        dtypes = [torch.bfloat16, torch.float32]
        settings += [
            ("1 bag of 200,000", [200_000], 512, 128, 5),
            ("1 bag of 200,000", [200_000], 1024, 256, 5),
            ("16 bags of 200 to 100,000", [*MIXED, *MIXED[:7], 100_000], 1536, 384, 5),
            ("4,096 bags of 50", [50] * 4096, 512, 128, 5),
        ]
    for dtype in dtypes:
        for name, lengths, depth, width, branches in settings:
            yield _case(name, lengths, depth, width, branches, dtype, device)


def _case(
    name: str,
    lengths: Sequence[int],
    depth: int,
    width: int,
    branches: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).div(shape[-1] ** 0.5).to(dtype).requires_grad_()

    weights = PoolWeights(
        draw(width, depth), draw(width), draw(width, depth), draw(width), draw(branches, width), draw(branches)
    )
    total = sum(lengths)
    x = torch.randn(total, depth, device=device).to(dtype).requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    leaves = [x, *(w for w in weights if w is not None)]
    runs = {
        "fovea": lambda: gated_attention_pool(x, weights, cu_seqlens)[0],
        "one bag at a time": lambda: torch.stack([_of_bag(bag, _scores(bag, weights)) for bag in x.split(lengths)]),
        "packed scores, then each bag": lambda: torch.stack(
            [_of_bag(b, s) for b, s in zip(x.split(lengths), _scores(x, weights).split(lengths), strict=True)]
        ),
        "segment softmax and index_add": lambda: _segments(x, weights, cu_seqlens),
        "padded batch": lambda: _padded(x, weights, lengths),
    }
    padded_bytes = len(lengths) * max(lengths) * (2 * depth + 6 * width) * x.element_size()
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 8e9
    absent = {"padded batch": "padding takes more memory than there is"} if padded_bytes > room / 2 else {}
    return Case(
        f"{name}, D={depth} h={width} K={branches}, {str(dtype).removeprefix('torch.')}",
        [Contestant(n, run, leaves, absent.get(n, "")) for n, run in runs.items()],
        baseline="one bag at a time",
        flops=total * (4 * depth * width + 2 * width * branches + 2 * depth * branches),
        bytes=(total * (depth + branches) + len(lengths) * branches * depth) * x.element_size(),
        tolerance=2e-3 if dtype == torch.float32 else 3e-2,
    )


def _scores(x: Tensor, w: PoolWeights) -> Tensor:
    assert w.sigmoid is not None
    gate = F.linear(x, w.tanh, w.tanh_bias).tanh() * F.linear(x, w.sigmoid, w.sigmoid_bias).sigmoid()
    return F.linear(gate, w.score, w.score_bias)


def _of_bag(x: Tensor, scores: Tensor) -> Tensor:
    return scores.t().softmax(-1) @ x


def _segments(x: Tensor, weights: PoolWeights, cu_seqlens: Tensor) -> Tensor:
    """Softmax and sums over all bags at once by scattering, branch by branch."""
    ids = segment_ids(cu_seqlens, len(x))
    bags = cu_seqlens.numel() - 1
    pooled = []
    for s in _scores(x, weights).float().unbind(1):
        highest = s.new_full((bags,), -torch.inf).scatter_reduce(0, ids, s.detach(), "amax")
        e = (s - highest[ids]).exp()
        p = e / e.new_zeros(bags).index_add(0, ids, e)[ids]
        pooled.append(x.new_zeros(bags, x.shape[1]).index_add(0, ids, p.to(x.dtype)[:, None] * x))
    return torch.stack(pooled, 1)


def _padded(x: Tensor, weights: PoolWeights, lengths: Sequence[int]) -> Tensor:
    """Every bag as long as the longest, with a mask."""
    batch = pad_sequence(list(x.split(list(lengths))), batch_first=True)
    places = torch.arange(batch.shape[1], device=x.device)
    outside = places >= torch.tensor(lengths, device=x.device)[:, None]
    scores = _scores(batch, weights).masked_fill(outside[:, :, None], -torch.inf)
    return scores.transpose(1, 2).softmax(-1) @ batch
