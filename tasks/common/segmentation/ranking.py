"""Pixels ranked by probability (ROC AUC, average precision), and centre-line Dice for vessels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.errors import InputError
from tasks.common.segmentation.thinning import skeleton

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PixelRanking:
    """Probabilities of the pixels inside and outside the reference, each ascending: (p,) and (m,).

    Both curves and both areas are exact however many pixels there are; equal probabilities are one step.
    """

    inside: NDArray
    outside: NDArray

    @property
    def prevalence(self) -> float:
        """Share of the pixels that are inside."""
        return len(self.inside) / max(1, len(self.inside) + len(self.outside))

    @cached_property
    def auc(self) -> float:
        """Area under the ROC curve: the share of pairs in the right order, ties one half; NaN if a side is empty."""
        if not (len(self.inside) and len(self.outside)):
            return float("nan")
        value, tp, _ = self._steps
        gained = tp - np.append(tp[1:], 0)
        below = np.searchsorted(self.outside, value, side="left").astype(np.float64)
        tied = np.searchsorted(self.outside, value, side="right") - below
        return float(gained @ (below + tied / 2) / (len(self.inside) * float(len(self.outside))))

    @cached_property
    def average_precision(self) -> float:
        """Sum of precision times the gain in recall over the thresholds; NaN if a side is empty."""
        if not (len(self.inside) and len(self.outside)):
            return float("nan")
        _, tp, fp = self._steps
        gained = tp - np.append(tp[1:], 0)
        return float(gained @ (tp / (tp + fp)) / len(self.inside))

    @cached_property
    def _steps(self) -> tuple[NDArray, Ints, Ints]:
        """Each different probability inside (ascending), true and false positives when pixels at or above it count."""
        value, first = np.unique(self.inside, return_index=True)
        return value, len(self.inside) - first, self._false_positives(value)

    def curve(self, points: int = 1000) -> tuple[Floats, Floats, Floats]:
        """False positive rate, recall and precision, each (k,), at about ``points`` thresholds from high to low.

        Thresholds are quantiles of both sides, so that every point lies on the exact curve and no bend is missed.
        """
        if not (len(self.inside) and len(self.outside)):
            raise InputError("a curve needs pixels inside and outside the reference; there is only one kind.")
        spots = [np.linspace(0, len(side) - 1, points // 2 + 1).astype(int) for side in (self.inside, self.outside)]
        values = np.unique(np.concatenate([self.inside[spots[0]], self.outside[spots[1]]]))[::-1]
        tp = len(self.inside) - np.searchsorted(self.inside, values, side="left")
        fp = self._false_positives(values)
        return fp / len(self.outside), tp / len(self.inside), tp / np.maximum(tp + fp, 1)

    def _false_positives(self, values: NDArray) -> Ints:
        return len(self.outside) - np.searchsorted(self.outside, values, side="left")


def rank_pixels(probabilities: ArrayLike, reference: ArrayLike, region: ArrayLike | None = None) -> PixelRanking:
    """Sort the pixels of one or many maps.

    Args:
        probabilities: any shape, one image or all that are pooled; integers (such as 8-bit maps) are taken as they are.
        reference: mask of the same shape.
        region: true where pixels count, of the same shape; for DRIVE the field of view, without which the black frame
            adds easy negatives.

    Raises:
        InputError: shapes differ, or a probability is NaN or infinite.

    >>> ranked = rank_pixels([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    >>> ranked.auc, round(ranked.average_precision, 4)
    (0.75, 0.8333)
    """
    p, r = np.asarray(probabilities), np.asarray(reference) != 0
    counted = None if region is None else np.asarray(region) != 0
    if p.shape != r.shape or (counted is not None and counted.shape != p.shape):
        raise InputError(f"probabilities {p.shape}, reference {r.shape} and region must have one shape.")
    if p.dtype.kind == "f" and not np.isfinite(p).all():
        raise InputError("a probability is NaN or infinite; the model that made them has diverged.")
    inside, outside = (r, ~r) if counted is None else (r & counted, ~r & counted)
    return PixelRanking(np.sort(p[inside]), np.sort(p[outside]))


def centreline_dice(predicted: ArrayLike, reference: ArrayLike, region: ArrayLike | None = None) -> dict[str, float]:
    """clDice of tubular structures: ``cldice``, ``topology_precision`` and ``topology_sensitivity``.

    Precision is the share of the predicted centre line inside the reference, sensitivity the share of the reference's
    centre line inside the prediction, clDice their harmonic mean. All are NaN when both masks are empty; when one is,
    clDice is 0 and the share of the missing centre line NaN. Centre lines are those of
    :func:`~tasks.common.segmentation.thinning.skeleton`, which keep the topology exactly as the measure presumes;
    others take the thinning of Zhang and Suen (2-D) or Lee et al. (3-D), whose lines differ by single pixels. For
    the second observer of DRIVE the mean is 0.759, with the lines of Zhang and Suen 0.763.

    Source: Shit et al., "clDice - a novel topology-preserving loss function for tubular structure segmentation", CVPR
    2021 (arXiv 2003.07311).

    Args:
        predicted, reference: masks (H, W) or (X, Y, Z).
        region: true where centre lines count; they are drawn on the whole masks, so that its border makes no ends.

    Raises:
        InputError: shapes differ, or a mask is neither 2-D nor 3-D or holds NaN.
    """
    p, r = np.asarray(predicted), np.asarray(reference)
    if p.shape != r.shape or (region is not None and np.shape(region) != p.shape):
        raise InputError(f"predicted {p.shape}, reference {r.shape} and region must have one shape.")
    lines = [skeleton(mask) for mask in (p, r)]
    if region is not None:
        lines = [line & (np.asarray(region) != 0) for line in lines]
    precision, sensitivity = _share(lines[0], r != 0), _share(lines[1], p != 0)
    known = [share for share in (precision, sensitivity) if not np.isnan(share)]
    if len(known) < 2:
        score = 0.0 if known else float("nan")
    else:
        score = 2 * precision * sensitivity / (precision + sensitivity) if precision + sensitivity else 0.0
    return {"cldice": score, "topology_precision": precision, "topology_sensitivity": sensitivity}


def _share(line: NDArray[np.bool_], mask: NDArray[np.bool_]) -> float:
    length = np.count_nonzero(line)
    return float(np.count_nonzero(line & mask) / length) if length else float("nan")
