"""Training a network with several exits, and leaving it early: loss, thresholds, and what they cost and bring.

A network has E exits, from the cheapest to the last, each with logits (N, K). A sample leaves at the first exit whose
largest softmax probability reaches that exit's threshold; the last exit takes who is left. Thresholds are chosen on a
validation split so that given shares of the samples leave at each exit.

Sources: Han et al., Dynamic Perceiver, ICCV 2023, arXiv:2306.11248 (loss); Huang et al., Multi-Scale Dense Networks,
ICLR 2018, arXiv:1703.09844 (thresholds from shares).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.errors import InputError

EXIT_WEIGHTS = (0.5, 0.5, 1.0, 1.0)
"""Weights of the losses of Dynamic Perceiver's exits, as published."""


class HasExits(Protocol):
    """A network whose exits can be computed one after the other."""

    def exits(self, x: Tensor) -> Iterator[Tensor]: ...


@dataclass
class EarlyExit:
    """What leaving early brings on a labelled set.

    Attributes:
        accuracy: share of right answers, from 0 to 1.
        shares: of the samples, that leave at each exit.
        accuracies: at each exit, of those who leave there; NaN where nobody does.
        cost: mean of what the samples cost, in the unit of the costs given; None without.
    """

    accuracy: float
    shares: list[float]
    accuracies: list[float]
    cost: float | None = None


def exit_loss(
    exits: Sequence[Tensor],
    target: Tensor,
    weights: Sequence[float] | None = None,
    distil: float = 0.5,
    temperature: float = 1.0,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """Weighted losses of all exits, and of the earlier ones their distance from the last one's answer.

    The distance is ``T² KL(softmax(y_last / T) || softmax(y / T))``, the mean over samples, summed over the earlier
    exits and weighted by ``distil``; the last exit is the teacher and gets no gradient from it.

    Args:
        exits: logits (N, K) of each exit.
        target: what ``loss`` takes; for cross entropy (N,) int64 classes or (N, K) probabilities.
        weights: of the losses, one per exit; None for those published where there are four exits, else 1 each.
        loss: of logits (N, K) and ``target``, a scalar.

    Raises:
        InputError: the number of weights is not that of exits, or the temperature is not positive.
    """
    if weights is None:
        weights = EXIT_WEIGHTS if len(exits) == len(EXIT_WEIGHTS) else (1.0,) * len(exits)
    if len(weights) != len(exits):
        raise InputError(f"exit_loss: {len(weights)} weights for {len(exits)} exits; give one for each.")
    if temperature <= 0:
        raise InputError(f"exit_loss: temperature={temperature} must be positive.")
    # float32 whatever autocast made of the logits: distillation compares small differences of logarithms.
    exits = [logits.float() for logits in exits]
    pairs = zip(weights, exits, strict=True)
    total = sum(weight * loss(y, target) for weight, y in pairs)
    assert isinstance(total, Tensor)
    teacher = F.log_softmax(exits[-1].detach() / temperature, dim=1)
    for logits in exits[:-1]:
        student = F.log_softmax(logits / temperature, dim=1)
        distance = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        total = total + distil * temperature**2 * distance
    return total


def geometric_shares(ratio: float, exits: int = 4) -> list[float]:
    """Shares ``ratio**k`` for k = 1 .. exits, made to sum to 1; a small ratio lets most samples leave early.

    >>> geometric_shares(1.0)
    [0.25, 0.25, 0.25, 0.25]
    """
    if ratio <= 0 or exits < 1:
        raise InputError(f"geometric_shares: ratio={ratio} must be positive and exits={exits} at least 1.")
    powers = [ratio**k for k in range(exits)]
    return [power / sum(powers) for power in powers]


@torch.no_grad()
def find_thresholds(exits: Sequence[Tensor], shares: Sequence[float]) -> list[float]:
    """Thresholds with which the given shares of a validation set leave at each exit.

    Exit by exit, the most confident of the samples still there leave, ``floor(N * share)`` of them; the threshold is
    the confidence of the last of these. Samples of equal confidence leave together.

    Args:
        exits: logits (N, K) of each exit on the validation set.
        shares: of the samples that should leave at each exit, from 0 to 1, with sum 1.

    Returns:
        One threshold per exit: ``inf`` where nobody leaves, ``-inf`` at the last.

    Raises:
        InputError: shares are negative, do not sum to 1 or are not as many as the exits.
    """
    if len(shares) != len(exits) or min(shares) < 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-3):
        raise InputError(
            f"find_thresholds: shares={list(shares)} must be {len(exits)} numbers from 0 to 1 with sum 1, one per exit."
        )
    confidences = [_confidence(logits) for logits in exits]
    staying = torch.ones_like(confidences[0], dtype=torch.bool)
    thresholds = []
    for confidence, share in zip(confidences[:-1], shares[:-1], strict=True):
        left = confidence[staying].sort(descending=True).values
        # A share of 0.3 of 10 samples is 3 of them, though 0.3 * 10 may be a little less.
        leaving = min(math.floor(len(staying) * share + 1e-6), len(left))
        threshold = left[leaving - 1].item() if leaving else math.inf
        thresholds.append(threshold)
        staying &= confidence < threshold
    return [*thresholds, -math.inf]


@torch.no_grad()
def exit_indices(exits: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    """The exit (N,) int64 at which each sample leaves, for logits (N, K) of each exit."""
    if len(thresholds) != len(exits):
        raise InputError(f"exit_indices: {len(thresholds)} thresholds for {len(exits)} exits; give one for each.")
    confidence = torch.stack([_confidence(logits) for logits in exits])
    reached = confidence >= torch.tensor(thresholds, dtype=confidence.dtype, device=confidence.device)[:, None]
    reached[-1] = True
    return reached.int().argmax(0)


@torch.no_grad()
def evaluate_exits(
    exits: Sequence[Tensor], target: Tensor, thresholds: Sequence[float], costs: Sequence[float] | None = None
) -> EarlyExit:
    """How right a network is that is left early, on logits (N, K) of each exit and classes (N,).

    Args:
        costs: of computing up to each exit, in any unit.
    """
    taken = exit_indices(exits, thresholds)
    answers = torch.stack([logits.argmax(1) for logits in exits])
    right = answers.gather(0, taken[None])[0] == target
    there = [taken == k for k in range(len(exits))]
    shares = [mask.double().mean().item() for mask in there]
    return EarlyExit(
        right.double().mean().item(),
        shares,
        [right[mask].double().mean().item() if mask.any() else math.nan for mask in there],
        None if costs is None else sum(share * cost for share, cost in zip(shares, costs, strict=True)),
    )


@torch.no_grad()
def predict_early(model: HasExits, x: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Logits (B, K) of the exit at which each image leaves, and that exit (B,) int64.

    The network is computed no further than the last image of the batch needs: one image at a time saves most.

    Args:
        model: in evaluation mode, with ``exits``, for instance Dynamic Perceiver.
        x: images (B, C, H, W).
        thresholds: as :func:`find_thresholds` gives them.

    Raises:
        InputError: there are more thresholds than exits; with fewer, whoever is left leaves at the last one's exit.
    """
    answer: Tensor | None = None
    taken = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    for index, (logits, threshold) in enumerate(zip(model.exits(x), thresholds, strict=False)):
        leaving = taken < 0
        if index < len(thresholds) - 1:
            leaving &= _confidence(logits) >= threshold
        answer = logits if answer is None else torch.where(leaving[:, None], logits, answer)
        taken[leaving] = index
        if bool((taken >= 0).all()):
            break
    if answer is None or bool((taken < 0).any()):
        raise InputError(f"predict_early: {len(thresholds)} thresholds do not fit this network's exits; give one each.")
    return answer, taken


def _confidence(logits: Tensor) -> Tensor:
    """The largest softmax probability (N,)."""
    return logits.float().softmax(1).amax(1)
