"""ROC and precision-recall of any number of images, from counts of their pixels at 2048 levels of probability."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVELS = 2048
_REACH = 16.0  # of the logits; a probability in single precision does not come nearer to 0 or 1


@dataclass(frozen=True)
class RankingCounts:
    """Pixels inside and outside the reference at each level, in the order of rising probability; they can be added.

    Levels are evenly spaced in the logit, so that they are fine near 0 and 1, where most probabilities are. The areas
    are those of the probabilities rounded so: for single images within 1e-4 of
    :class:`tasks.common.segmentation.ranking.PixelRanking`, which keeps every pixel.

    Attributes:
        inside, outside: (LEVELS,), or (s, LEVELS) for s sets at once.
    """

    inside: NDArray
    outside: NDArray

    def __add__(self, other: RankingCounts) -> RankingCounts:
        return RankingCounts(self.inside + other.inside, self.outside + other.outside)

    @property
    def prevalence(self) -> float:
        """Share of the pixels that are inside."""
        return float(self.inside.sum() / max(1, self.inside.sum() + self.outside.sum()))

    @property
    def auc(self) -> float:
        """Area under the ROC curve; NaN if a side is empty."""
        return float(self.aucs())

    @property
    def average_precision(self) -> float:
        """Sum of precision times the gain in recall; NaN if a side is empty."""
        tp, fp = (np.cumsum(side[..., ::-1], -1) for side in (self.inside, self.outside))
        if not (tp[-1] and fp[-1]):
            return float("nan")
        return float(np.diff(tp, prepend=0) @ (tp / np.maximum(tp + fp, 1)) / tp[-1])

    def aucs(self) -> Floats:
        """Areas under the ROC curves of all sets, (s,)."""
        inside, outside = self.inside.astype(np.float64), self.outside.astype(np.float64)
        below = np.cumsum(outside, -1) - outside / 2  # ties count one half
        pairs = inside.sum(-1) * outside.sum(-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((inside * below).sum(-1) / np.where(pairs > 0, pairs, np.nan))

    def curve(self, points: int = LEVELS) -> tuple[Floats, Floats, Floats]:
        """False positive rate, recall and precision, each (k,), from high to low thresholds.

        Raises:
            InputError: pixels of one kind only.
        """
        if not (self.inside.any() and self.outside.any()):
            raise InputError("a curve needs pixels inside and outside the reference; there is only one kind.")
        used = np.flatnonzero((self.inside + self.outside)[::-1])[: max(points, 1)]
        tp, fp = (np.cumsum(side[::-1])[used].astype(np.float64) for side in (self.inside, self.outside))
        return fp / self.outside.sum(), tp / self.inside.sum(), tp / np.maximum(tp + fp, 1)


def count_ranking(probabilities: ArrayLike, reference: ArrayLike, region: ArrayLike | None = None) -> RankingCounts:
    """Count the pixels of one image.

    Args:
        probabilities: of any shape, in [0, 1].
        reference: mask of the same shape.
        region: true where pixels count, such as the field of view.

    Raises:
        InputError: shapes differ, or a probability is NaN or beyond 0 to 1.

    >>> round(count_ranking([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]).auc, 3)
    0.75
    """
    p, r = np.asarray(probabilities), np.asarray(reference) != 0
    if p.shape != r.shape or (region is not None and np.shape(region) != p.shape):
        raise InputError(f"probabilities {p.shape}, reference {r.shape} and region must have one shape.")
    if region is not None:
        counted = np.asarray(region) != 0
        p, r = p[counted], r[counted]
    if p.size and not (p.min() >= 0 and p.max() <= 1):
        raise InputError("a probability is NaN or outside [0, 1]; are these logits, or has the model diverged?")
    with np.errstate(divide="ignore"):
        logits = np.log(p) - np.log1p(-p)
    scaled = (np.clip(logits, -_REACH, _REACH) + _REACH) * ((LEVELS - 1) / (2 * _REACH))
    codes = 2 * np.rint(scaled).astype(np.int64) + r
    table = np.bincount(codes.ravel(), minlength=2 * LEVELS).reshape(LEVELS, 2)
    return RankingCounts(table[:, 1], table[:, 0])
