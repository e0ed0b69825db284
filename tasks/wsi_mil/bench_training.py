"""Training steps of ACMIL on synthetic bags, beside the formulation of the paper written down as it reads.

Every step is forward, loss, backward and AdamW on the CPU. The row of the largest bag runs each side in a process of
its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attention
from attention.acmil import ACMIL
from attention.pooling import default_hidden_dim
from tasks.common.bench import BenchRow, median_times, peak_memory_mb
from tasks.wsi_mil.targets import Target

_PLAIN = "plain formulation of the paper"
_TARGET = Target("binary", ("negative", "positive"))


class PlainACMIL(nn.Module):
    """ACMIL for one bag as the paper reads: a pass over the instances per branch, and one more for the bag.

    Parameter names are those of the released code, so that :func:`attention.load_official` takes its state.
    """

    def __init__(self, dim: int, num_classes: int, num_branches: int = 5, num_masked: int = 10, mask_drop: float = 0.6):
        super().__init__()
        hidden = default_hidden_dim(dim)
        self.num_masked = num_masked
        self.mask_drop = mask_drop
        self.dimreduction = nn.ModuleDict({"fc1": nn.Linear(dim, hidden, bias=False)})
        self.attention = nn.ModuleDict(
            {
                "attention_V": nn.Sequential(nn.Linear(hidden, 128), nn.Tanh()),
                "attention_U": nn.Sequential(nn.Linear(hidden, 128), nn.Sigmoid()),
                "attention_weights": nn.Linear(128, num_branches),
            }
        )
        self.classifier = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(hidden, num_classes)}) for _ in range(num_branches)
        )
        self.Slide_classifier = nn.ModuleDict({"fc": nn.Linear(hidden, num_classes)})

    def forward(self, bag: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Branch logits (K, C), bag logits (1, C) and scores (K, N) of ``bag (N, D)``; ``noise (K, num_masked)``."""
        hidden = F.relu(self.dimreduction["fc1"](bag))
        gated = self.attention["attention_V"](hidden) * self.attention["attention_U"](hidden)
        scores = self.attention["attention_weights"](gated).transpose(0, 1)
        if self.training and self.num_masked:
            count = min(self.num_masked, scores.shape[1])
            top = scores.topk(count, dim=-1).indices
            noise = torch.rand(top.shape) if noise is None else noise[:, :count]
            chosen = noise.argsort(dim=-1)[:, : int(count * self.mask_drop)]
            hide = torch.ones_like(scores).scatter(-1, top.gather(-1, chosen), 0)
            scores = scores.masked_fill(hide == 0, -1e9)
        branch_logits = []
        for branch, head in enumerate(self.classifier):
            feature = F.softmax(scores[branch : branch + 1], dim=1) @ hidden
            branch_logits.append(head["fc"](feature))  # type: ignore[index]
        bag_attention = F.softmax(scores, dim=1).mean(0, keepdim=True)
        return torch.cat(branch_logits), self.Slide_classifier["fc"](bag_attention @ hidden), scores

    def loss(self, outputs: tuple[Tensor, Tensor, Tensor], label: Tensor) -> Tensor:
        """Semantic + bag + diversity loss."""
        branch_logits, bag_logits, scores = outputs
        weights = F.softmax(scores, dim=-1)
        branches = len(weights)
        similarity = weights.new_zeros(())
        for first in range(branches):
            for second in range(first + 1, branches):
                similarity = similarity + F.cosine_similarity(weights[first], weights[second], dim=-1)
        similarity = similarity / (branches * (branches - 1) / 2)
        semantic = F.cross_entropy(branch_logits, label.repeat_interleave(branches))
        return semantic + F.cross_entropy(bag_logits, label) + similarity


def rows() -> Iterator[BenchRow]:
    """Bags of 1k, 10k and 50k x 1024, sixteen small bags packed, and 200k x 1536 with its peak memory."""
    for count in (1_000, 10_000, 50_000):
        features = torch.randn(count, 1024)
        calls = {"ours": our_step(features, [count]), "plain": plain_step(features)}
        times = median_times(calls, repeats=max(5, 100_000 // count // 2))
        yield BenchRow(f"ACMIL step, bag of {count:,} x 1024", times["ours"], times["plain"], _PLAIN)
    sizes = [300 + 25 * bag for bag in range(16)]
    features = torch.randn(sum(sizes), 1024)
    calls = {"packed": our_step(features, sizes), "single": our_step(features, sizes, packed=False)}
    times = median_times(calls)
    name = f"ACMIL step, 16 bags of {sizes[0]} to {sizes[-1]} x 1024, packed"
    yield BenchRow(name, times["packed"], times["single"], "the same bags one at a time, one update")
    ours, plain = (_alone(side, 200_000, 1536) for side in ("ours", "plain"))
    yield BenchRow(
        "ACMIL step, bag of 200,000 x 1536 (1.2 GB of features)",
        ours["seconds"],
        plain["seconds"],
        f"{_PLAIN}, peak {plain['peak_mb']:,.0f} MB",
        peak_mb=ours["peak_mb"],
    )


def our_step(features: Tensor, sizes: list[int], packed: bool = True) -> Callable[[], object]:
    """One training step on the bags of ``sizes`` that lie in ``features (T, D)``: in one pass, or bag by bag."""
    pooler = attention.create("acmil", dim=features.shape[1], num_classes=2)
    assert isinstance(pooler, ACMIL)
    optimizer = torch.optim.AdamW(pooler.parameters(), lr=1e-4, weight_decay=1e-5)
    batches = [features] if packed else list(features.split(sizes))
    bounds = [torch.tensor([0, *part]).cumsum(0) for part in ([sizes] if packed else [[size] for size in sizes])]
    labels = [torch.arange(len(bound) - 1) % 2 for bound in bounds]

    def step() -> None:
        optimizer.zero_grad()
        for batch, cu_seqlens, label in zip(batches, bounds, labels, strict=True):
            losses = pooler.loss(pooler(batch, cu_seqlens), label, cu_seqlens, _TARGET)
            (losses["total"] / len(batches)).backward()
        optimizer.step()

    return step


def plain_step(features: Tensor) -> Callable[[], object]:
    """One training step of the plain formulation on the bag ``features (N, D)``."""
    model = PlainACMIL(features.shape[1], 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-5)
    label = torch.tensor([1])

    def step() -> None:
        optimizer.zero_grad()
        model.loss(model(features), label).backward()
        optimizer.step()

    return step


def _alone(side: str, count: int, dim: int) -> dict[str, float]:
    """Seconds and peak memory of one side's step, measured in a process of its own."""
    command = [sys.executable, "-m", "tasks.wsi_mil.bench_training", side, str(count), str(dim)]
    threads = str(torch.get_num_threads())
    done = subprocess.run([*command, threads], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _measure(side: str, count: int, dim: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    features = torch.randn(count, dim)
    step = our_step(features, [count]) if side == "ours" else plain_step(features)
    seconds = median_times({side: step}, repeats=3)[side]
    return {"seconds": seconds, "peak_mb": peak_memory_mb()}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], *map(int, sys.argv[2:5]))))
