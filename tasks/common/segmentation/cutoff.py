"""The probability at which a voxel is called inside: searched on validation cases, from one pass over each map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CUTOFFS = tuple(round(0.1 * k, 1) for k in range(1, 11))
_BLOCK = 4_000_000


@dataclass(frozen=True)
class CutoffCounts:
    """What one case would give at each cut-off.

    Attributes:
        tp: (c,) voxels at or above the cut-off inside the reference.
        predicted: (c,) voxels at or above the cut-off.
        reference: voxels of the reference.
    """

    tp: Ints
    predicted: Ints
    reference: int

    @property
    def dice(self) -> Floats:
        """(c,) Dice at each cut-off; 0 where both masks are empty."""
        return 2 * self.tp / np.maximum(self.predicted + self.reference, 1)


@dataclass(frozen=True)
class BestCutoff:
    """The cut-off that the validation cases choose.

    Attributes:
        cutoff: voxels with at least this probability are inside.
        overlap: the Dice from which a patient counts as found.
        score: (mean Dice of the found + recall) / 2 at both.
        dice: mean Dice of the patients found.
        recall: share of patients found.
        scores: (c, t) the score of every pair of cut-off and overlap, for a table or a picture.
    """

    cutoff: float
    overlap: float
    score: float
    dice: float
    recall: float
    scores: Floats


def cutoff_counts(
    probabilities: ArrayLike, reference: ArrayLike, cutoffs: Sequence[float] = CUTOFFS, region: ArrayLike | None = None
) -> CutoffCounts:
    """Count one case at every cut-off, sorting each probability into its place among them once.

    A cut-off is compared in the precision of the map: 0.7 means the float32 nearest to 0.7 for a float32 map.

    Args:
        probabilities: (\\*spatial) float in [0, 1].
        reference: (\\*spatial) mask.
        cutoffs: (c,) ascending.
        region: (\\*spatial) true where voxels count.

    Raises:
        InputError: shapes differ, a probability is NaN or outside [0, 1], or the cut-offs do not ascend.
    """
    p, r = np.asarray(probabilities), np.asarray(reference) != 0
    if p.dtype.kind != "f":
        p = p.astype(np.float64)
    inside = None if region is None else np.asarray(region) != 0
    if p.shape != r.shape or (inside is not None and inside.shape != p.shape):
        raise InputError(f"probabilities {p.shape}, reference {r.shape} and region must have one shape.")
    edges = np.asarray(cutoffs, dtype=p.dtype)
    if not len(edges) or (np.diff(edges) <= 0).any():
        raise InputError(f"the cut-offs {list(cutoffs)} must be ascending and different.")
    if p.size and not (p.min() >= 0 and p.max() <= 1):
        raise InputError("a probability is NaN or outside [0, 1]; are these logits, or has the model diverged?")
    table = np.zeros((len(edges) + 1, 2), dtype=np.int64)
    flat, truth = p.reshape(-1), r.reshape(-1)
    chosen = None if inside is None else inside.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        span = slice(start, start + _BLOCK)
        # Most voxels of a map are surely outside; only those that reach some cut-off need their place found.
        reached = flat[span] >= edges[0]
        counted = truth[span]
        if chosen is not None:
            reached &= chosen[span]
            counted = counted & chosen[span]
        place = np.searchsorted(edges, flat[span][reached], side="right")
        hits = counted[reached]
        table += np.bincount(2 * place + hits, minlength=table.size).reshape(table.shape)
        table[0, 1] += np.count_nonzero(counted) - np.count_nonzero(hits)
    above = table[::-1].cumsum(axis=0)[::-1]  # at or above each cut-off
    return CutoffCounts(tp=above[1:, 1], predicted=above[1:].sum(axis=1), reference=int(above[0, 1]))


def best_cutoff(
    cases: Sequence[CutoffCounts], cutoffs: Sequence[float] = CUTOFFS, overlaps: Sequence[float] = (0.0,)
) -> BestCutoff:
    """The pair of cut-off and overlap with the largest (mean Dice of the found + recall) / 2.

    Call it on validation cases only: a cut-off chosen on the cases it is reported on flatters them. A patient is found
    when the Dice is at least ``overlap``; at the overlap of 0 everybody is, and the mean Dice decides. Cases without a
    reference have nothing to find and do not take part. Where scores tie, the cut-off nearest to 0.5 wins and the
    lowest overlap.

    Source: the search of the Raidionics validation library.

    Args:
        cases: one for each patient, counted at the same ``cutoffs`` (c,).
        overlaps: (t,) in [0, 1].

    Raises:
        InputError: no case has a reference, or an overlap is out of range.
    """
    with_reference = [case for case in cases if case.reference > 0]
    if not with_reference:
        raise InputError("no validation case has a reference, so that no cut-off can be chosen; set it by hand.")
    least = np.asarray(overlaps, dtype=np.float64)
    if not least.size or least.min() < 0 or least.max() > 1:
        raise InputError(f"the overlaps {list(overlaps)} must be Dice values from 0 to 1.")
    dice = np.stack([case.dice for case in with_reference])  # (n, c)
    if dice.shape[1] != len(cutoffs):
        raise ValueError(f"the cases were counted at {dice.shape[1]} cut-offs, not at {len(cutoffs)}")
    found = dice[:, :, None] >= least  # (n, c, t)
    number = found.sum(axis=0)
    mean = (dice[:, :, None] * found).sum(axis=0) / np.maximum(number, 1)
    recall = number / len(dice)
    scores = (mean + recall) / 2
    ties = np.argwhere(scores >= scores.max() - 1e-12)
    distance = np.abs(np.asarray(cutoffs)[ties[:, 0]] - 0.5)
    c, t = ties[np.lexsort((least[ties[:, 1]], np.round(distance, 9)))[0]]
    return BestCutoff(
        float(cutoffs[c]), float(least[t]), float(scores[c, t]), float(mean[c, t]), float(recall[c, t]), scores
    )
