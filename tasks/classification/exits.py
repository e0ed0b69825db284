"""Networks that may be left early: the loss of their exits, thresholds from a validation set, accuracy against cost.

A network has E exits with logits (N, K) each, the cheapest first. An image leaves at the first exit whose largest
probability reaches that exit's threshold; the last exit takes who is left.

Sources: Huang et al., Multi-Scale Dense Networks, ICLR 2018, arXiv:1703.09844 (thresholds from shares); Han et al.,
Dynamic Perceiver, ICCV 2023, arXiv:2306.11248 (loss).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)
_DISTIL = 0.5


def exit_loss(exits: Sequence[Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of ``loss`` over the exits, and half the mean distance of the earlier ones from the last one's answer.

    Args:
        exits: logits (B, K) of each exit.
        loss: logits to a scalar.
    """
    answers = [logits.float() for logits in exits]
    total = torch.stack([loss(logits) for logits in answers]).mean()
    teacher = F.log_softmax(answers[-1].detach(), dim=1)
    distances = [
        F.kl_div(F.log_softmax(logits, dim=1), teacher, reduction="batchmean", log_target=True)
        for logits in answers[:-1]
    ]
    return total + _DISTIL * torch.stack(distances).mean() if distances else total


def shares(ratio: float, exits: int) -> list[float]:
    """Shares of the images that leave at each exit, ``ratio**k`` made to sum to one.

    >>> shares(1.0, 4)
    [0.25, 0.25, 0.25, 0.25]
    """
    powers = [ratio**k for k in range(exits)]
    return [power / sum(powers) for power in powers]


def thresholds(exits: Sequence[Tensor], wanted: Sequence[float]) -> list[float]:
    """One threshold per exit with which ``wanted`` shares of the validation images (N, K) leave there."""
    confidence = [logits.float().softmax(1).amax(1) for logits in exits]
    staying = torch.ones_like(confidence[0], dtype=torch.bool)
    found = []
    for stated, share in zip(confidence[:-1], wanted[:-1], strict=True):
        left = stated[staying].sort(descending=True).values
        leaving = min(int(len(staying) * share + 1e-6), len(left))
        found.append(float(left[leaving - 1]) if leaving else float("inf"))
        staying &= stated < found[-1]
    return [*found, float("-inf")]


def leave(exits: Sequence[Tensor], limits: Sequence[float]) -> Tensor:
    """The exit (N,) at which each image leaves."""
    confidence = torch.stack([logits.float().softmax(1).amax(1) for logits in exits])
    return (confidence >= torch.tensor(limits, dtype=confidence.dtype)[:, None]).int().argmax(0)


def curve(
    val: Sequence[Tensor], test: Sequence[Tensor], target: Tensor, costs: Sequence[float] | None
) -> list[dict[str, Any]]:
    """Accuracy on the test images (N, K) for thresholds of the validation images, from hasty to patient.

    Args:
        costs: of computing up to each exit; None where they are not known.

    Returns:
        rows of ``ratio``, ``thresholds``, ``images``, ``right``, ``shares`` per exit, and ``flops`` and ``saved`` (the
        share of the last exit's cost) where costs are known.
    """
    answers = torch.stack([logits.argmax(1) for logits in test])
    rows = []
    for ratio in _RATIOS:
        limits = thresholds(val, shares(ratio, len(val)))
        taken = leave(test, limits)
        right = answers.gather(0, taken[None])[0] == target
        left = [float((taken == k).double().mean()) for k in range(len(test))]
        row: dict[str, Any] = {"ratio": ratio, "images": len(target), "right": int(right.sum()), "shares": left}
        row["thresholds"] = [limit if abs(limit) != float("inf") else None for limit in limits]
        if costs is not None:
            row["flops"] = sum(share * cost for share, cost in zip(left, costs, strict=True))
            row["saved"] = 1 - row["flops"] / costs[-1]
        rows.append(row)
    return rows


def pooled(curves: Sequence[Sequence[dict[str, Any]]]) -> pd.DataFrame:
    """The curves of all folds as one: columns ratio, accuracy, flops, saved and share_1 ... of the exits."""
    table = []
    for rows in zip(*curves, strict=True):
        images = sum(row["images"] for row in rows)
        mean = {"ratio": rows[0]["ratio"], "accuracy": sum(row["right"] for row in rows) / images}
        for name in ("flops", "saved"):
            if name in rows[0]:
                mean[name] = sum(row[name] * row["images"] for row in rows) / images
        for k in range(len(rows[0]["shares"])):
            mean[f"share_{k + 1}"] = sum(row["shares"][k] * row["images"] for row in rows) / images
        table.append(mean)
    return pd.DataFrame(table)


def figure(table: pd.DataFrame, full: float) -> Figure:
    """Accuracy against the share of operations saved; ``full`` is the accuracy of the last exit for every image."""
    drawn = Figure(figsize=(5.2, 3.8), layout="constrained")
    axes = drawn.add_subplot()
    axes.plot(100 * table["saved"], table["accuracy"], "o-", color="#0072B2", label="thresholds of the validation set")
    axes.axhline(full, color="#777777", linestyle="--", linewidth=1, label="last exit for all")
    axes.set(xlabel="Operations saved (%)", ylabel="Accuracy")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn
