"""Was the structure found in this patient? Detection rates, Dice of those found, by volume and pooled over folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.errors import InputError, unknown_name

Convention = Literal["all", "positive", "tp"]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

VOLUME_LIMIT_ML = 3.0  # arXiv 2101.07715 splits meningiomas here: nearly all above are found
RELEASED_SMOOTHING = 1e-6  # what the Raidionics validation library adds to denominators
CONVENTIONS = {
    "all": "a patient is positive when the volume is above 0, in reference and prediction each for itself",
    "positive": "a patient is positive when the volume is above the limit, in reference and prediction each for itself",
    "tp": "a patient with a reference above the limit is found or missed by the Dice; one without is falsely positive "
    "when the predicted volume is above the limit",
}


@dataclass(frozen=True)
class Detections:
    """What became of each patient, four flags (n,) of which one is true."""

    tp: Flags
    fp: Flags
    fn: Flags
    tn: Flags


def patientwise_metrics(
    dice: ArrayLike,
    reference_ml: ArrayLike,
    predicted_ml: ArrayLike,
    convention: Convention = "tp",
    volume_limit_ml: float = VOLUME_LIMIT_ML,
    overlap: float = 0.0,
    smoothing: float = 0.0,
) -> dict[str, float]:
    """Detection rates, mean Dice and Dice-TP of a cohort.

    Args:
        dice: (n,) Dice of each patient; NaN is allowed where both volumes are 0, and is then left out of the mean.
        reference_ml, predicted_ml: (n,) volumes in ml.
        convention: see :data:`CONVENTIONS`; under ``tp`` a structure predicted in the wrong place is one miss and no
            false positive.
        volume_limit_ml: the limit of the conventions.
        overlap: a structure is found when its Dice is above this.
        smoothing: added to denominators; :data:`RELEASED_SMOOTHING` gives the numbers of the released library, 0 the
            plain ratios, NaN where nothing is divided by nothing.

    Returns:
        ``recall``, ``precision``, ``specificity``, ``f1``, ``accuracy``, ``balanced_accuracy``, ``dice`` (mean over all
        patients) and ``dice_tp`` (over those found whose reference is above the limit).

    Raises:
        InputError: lengths differ, a volume is negative or not finite, or a Dice is NaN without cause.

    Source: Bouget et al., "Meningioma segmentation in T1-weighted MRI leveraging global context and attention
    mechanisms", Frontiers in Radiology 1:711514, 2021 (arXiv 2101.07715), and the Raidionics validation library.

    >>> found = patientwise_metrics([0.8, 0.0, 0.0], [5.0, 4.0, 0.0], [4.5, 0.0, 0.0])
    >>> found["recall"], found["precision"], round(found["dice"], 3), found["dice_tp"]
    (0.5, 1.0, 0.267, 0.8)
    """
    found = detections(dice, reference_ml, predicted_ml, convention, volume_limit_ml, overlap)
    values, volumes = np.asarray(dice, dtype=np.float64), np.asarray(reference_ml, dtype=np.float64)
    everyone = np.ones((1, len(values)))
    rates = {name: float(rate[0]) for name, rate in detection_rates(found, everyone, smoothing).items()}
    good = (values > overlap) & (volumes > volume_limit_ml)
    return {
        **rates,
        "dice": float(weighted_mean(values, everyone)[0]),
        "dice_tp": float(weighted_mean(np.where(good, values, np.nan), everyone)[0]),
    }


def detections(
    dice: ArrayLike,
    reference_ml: ArrayLike,
    predicted_ml: ArrayLike,
    convention: Convention = "tp",
    volume_limit_ml: float = VOLUME_LIMIT_ML,
    overlap: float = 0.0,
) -> Detections:
    """True and false positives and negatives of a cohort; arguments as in :func:`patientwise_metrics`."""
    d, r, p = _columns(dice, reference_ml, predicted_ml)
    if convention not in get_args(Convention):
        raise unknown_name("patient-wise convention", convention, get_args(Convention))
    if not (volume_limit_ml >= 0 and 0 <= overlap < 1):
        raise InputError(
            f"the volume limit {volume_limit_ml} ml must be at least 0 and the overlap {overlap} in [0, 1)."
        )
    limit = 0.0 if convention == "all" else volume_limit_ml
    there, claimed = r > limit, p > limit
    hit = there & (d > overlap) if convention == "tp" else there & claimed
    return Detections(tp=hit, fp=claimed & ~there, fn=there & ~hit, tn=~there & ~claimed)


def detection_rates(found: Detections, weights: Floats, smoothing: float = 0.0) -> dict[str, Floats]:
    """The six rates (s,) of each row of weights (s, n), the copies of each patient that a resample holds."""
    tp, fp, fn, tn = (weights @ flag.astype(np.float64) for flag in (found.tp, found.fp, found.fn, found.tn))
    recall, precision = _ratio(tp, tp + fn, smoothing), _ratio(tp, tp + fp, smoothing)
    specificity = _ratio(tn, tn + fp, smoothing)
    f1 = (
        _ratio(2 * recall * precision, recall + precision, smoothing) if smoothing else _ratio(2 * tp, 2 * tp + fp + fn)
    )
    return {
        "recall": recall,
        "precision": precision,
        "specificity": specificity,
        "f1": f1,
        "accuracy": _ratio(tp + tn, tp + fp + fn + tn, smoothing),
        "balanced_accuracy": (recall + specificity) / 2,
    }


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """Mean (s,) of the values (n,) that are not NaN under each row of weights (s, n); NaN where none is left."""
    known = ~np.isnan(values)
    return _ratio(weights[:, known] @ values[known], weights[:, known].sum(axis=1))


def by_volume(reference_ml: ArrayLike, limit_ml: float = VOLUME_LIMIT_ML) -> dict[str, Flags]:
    """Which cases (n,) have a structure below the limit and which one at or above it; cases without are in neither.

    >>> {name: flags.tolist() for name, flags in by_volume([0.0, 2.9, 3.0]).items()}
    {'< 3 ml': [False, True, False], '>= 3 ml': [False, False, True]}
    """
    volumes = np.asarray(reference_ml, dtype=np.float64)
    return {f"< {limit_ml:g} ml": (volumes > 0) & (volumes < limit_ml), f">= {limit_ml:g} ml": volumes >= limit_ml}


def pool_folds(means: ArrayLike, deviations: ArrayLike, sizes: Sequence[int]) -> tuple[Floats, Floats]:
    """Mean over folds weighted by their sizes, and the pooled sample standard deviation within them.

    Folds whose mean is NaN count nowhere; folds of one case count in the mean only.

    Args:
        means: (folds,) or (folds, k).
        deviations: sample standard deviations (n - 1) of the folds, of the same shape.
        sizes: cases in each fold.

    >>> mean, deviation = pool_folds([0.8, 0.5], [0.1, 0.2], [30, 10])
    >>> float(mean), round(float(deviation), 4)
    (0.725, 0.1308)
    """
    m, s = np.asarray(means, dtype=np.float64), np.asarray(deviations, dtype=np.float64)
    n = np.asarray(sizes, dtype=np.float64)
    if m.shape != s.shape or m.shape[:1] != n.shape:
        raise ValueError(f"means {m.shape} and deviations {s.shape} must be alike, with one row for each of {n.shape}")
    n = np.where(np.isnan(m), 0.0, n.reshape(-1, *[1] * (m.ndim - 1)))
    freedom = np.where(n > 1, n - 1, 0)
    squares = np.where(freedom > 0, freedom * s**2, 0).sum(axis=0)
    return _ratio(np.nansum(n * m, axis=0), n.sum(axis=0)), np.sqrt(_ratio(squares, freedom.sum(axis=0)))


def _columns(dice: ArrayLike, reference_ml: ArrayLike, predicted_ml: ArrayLike) -> tuple[Floats, Floats, Floats]:
    d, r, p = (np.asarray(values, dtype=np.float64) for values in (dice, reference_ml, predicted_ml))
    if not (d.shape == r.shape == p.shape) or d.ndim != 1:
        raise InputError(f"Dice {d.shape} and volumes {r.shape}, {p.shape} must be one number for each patient.")
    if not (np.isfinite(r) & np.isfinite(p) & (r >= 0) & (p >= 0)).all():
        raise InputError("a volume is negative, NaN or infinite; volumes are in ml, 0 for an empty mask.")
    lost = np.flatnonzero(np.isnan(d) & ((r > 0) | (p > 0)))
    if lost.size or (d < 0).any() or (d > 1).any():
        raise InputError(
            f"{lost.size} patients have a volume but no Dice, or a Dice lies outside [0, 1]; "
            "compute it from the masks before asking who was found."
        )
    return d, r, p


def _ratio(numerator: Floats, denominator: Floats, smoothing: float = 0.0) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(numerator, denominator + smoothing))
