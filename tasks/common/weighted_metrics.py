"""Classification metrics of many weighted copies of one data set at once.

A bootstrap resample is the data set with a whole number of copies of each sample, so a metric of S resamples is a
metric of S rows of weights. Scores are sorted once and a resample then costs one cumulative sum; counts are matrix
products. With a single row of ones the same code gives the plain metric, hence the two can never disagree.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError, unknown_name

Kind = Literal["binary", "multiclass", "multilabel", "ordinal"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CALIBRATION_BINS = 10  # cohorts have hundreds of cases, not the tens of thousands for which 15 or 20 bins are usual
_SMALLEST_PROBABILITY = float(np.finfo(np.float64).eps)  # keeps the log loss of a certain, wrong answer finite


def check_predictions(probabilities: NDArray, targets: NDArray, kind: Kind) -> tuple[Floats, Ints]:
    """The two arrays as float64 (n, c) and int64 (n,), or (n, c) for ``multilabel``.

    Raises:
        InputError: ``kind`` is unknown, or a probability is NaN or infinite, as those of a diverged model are.
        ValueError: shapes do not fit, values are no probabilities, or a target is out of range.
    """
    if kind not in get_args(Kind):
        raise unknown_name("kind of target", kind, get_args(Kind))
    p, t = np.asarray(probabilities, dtype=np.float64), np.asarray(targets)
    if p.ndim != 2 or p.shape[0] == 0 or p.shape[1] == 0:
        raise ValueError(f"probabilities must be (n, c) with n, c > 0, not {p.shape}")
    if kind == "binary" and p.shape[1] != 2:
        raise ValueError(f"binary probabilities must be (n, 2), not {p.shape}")
    expected = p.shape if kind == "multilabel" else p.shape[:1]
    if t.shape != expected:
        raise ValueError(f"targets must be {expected} for {kind} probabilities {p.shape}, not {t.shape}")
    bad = np.flatnonzero(~np.isfinite(p).all(axis=1))
    if bad.size:
        raise InputError(
            f"{bad.size} of {len(p)} predictions hold NaN or infinity (first: row {bad[0]}), so the model that made "
            "them has diverged; train it again with a lower learning rate."
        )
    if p.min() < -1e-6 or p.max() > 1 + 1e-6:
        raise ValueError(f"probabilities must lie in [0, 1], not [{p.min():.3g}, {p.max():.3g}]; are these logits?")
    if kind != "multilabel" and np.abs(p.sum(axis=1) - 1).max() > 1e-2:
        raise ValueError("each row of probabilities must sum to 1; are these logits or independent labels?")
    whole = t.astype(np.int64)
    highest = 1 if kind == "multilabel" else p.shape[1] - 1
    if (whole != t).any() or whole.min() < 0 or whole.max() > highest:
        raise ValueError(f"targets must be whole numbers from 0 to {highest}, not {t.min()} to {t.max()}")
    return p, whole


def decide(probabilities: Floats, kind: Kind) -> Ints:
    """The decision without any tuned threshold: the arg-max (n,), or (n, c) of 'more than 0.5' for ``multilabel``.

    Ties go to the lower class; for two classes the arg-max is the threshold 0.5 on class 1.
    """
    if kind == "multilabel":
        return (probabilities > 0.5).astype(np.int64)
    return probabilities.argmax(axis=1)


def calibration_pairs(probabilities: Floats, targets: Ints, kind: Kind) -> tuple[Floats, Floats]:
    """What calibration compares: stated probability and outcome (0 or 1), both (n, columns).

    One column of class 1 for ``binary``; one of the most probable class for ``multiclass`` and ``ordinal`` (Guo et al.,
    "On Calibration of Modern Neural Networks", ICML 2017); one per label for ``multilabel``.
    """
    if kind == "binary":
        return probabilities[:, 1:], targets[:, None].astype(np.float64)
    if kind == "multilabel":
        return probabilities, targets.astype(np.float64)
    return probabilities.max(axis=1, keepdims=True), (decide(probabilities, kind) == targets)[:, None].astype(
        np.float64
    )


def calibration_bin(stated: Floats, bins: int = CALIBRATION_BINS) -> Ints:
    """Which of ``bins`` equal-width bins of [0, 1] each stated probability falls in; 1.0 is in the last."""
    return np.clip((stated * bins).astype(np.int64), 0, bins - 1)


def weighted_metrics(
    probabilities: Floats, targets: Ints, kind: Kind, weights: Floats, names: Sequence[str] | None = None
) -> dict[str, Floats]:
    """Every metric of every row of weights; undefined ones are NaN.

    Args:
        probabilities: (n, c), checked by :func:`check_predictions`.
        targets: (n,), or (n, c) for ``multilabel``.
        weights: (s, n) whole numbers of copies of each sample; each row sums to more than 0.
        names: what to call the classes in per-class keys such as ``recall/tumour``; their numbers by default.

    Returns:
        name of the metric -> (s,).
    """
    names = [str(i) for i in range(probabilities.shape[1])] if names is None else names
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Mean of empty slice"
        )  # no class is defined: the mean is NaN, as it should be
        if kind == "multilabel":
            return _of_labels(probabilities, targets, weights, names)
        return _of_classes(probabilities, targets, kind, weights, names)


def _of_classes(p: Floats, t: Ints, kind: Kind, w: Floats, names: Sequence[str]) -> dict[str, Floats]:
    num_classes = p.shape[1]
    total = w.sum(axis=1)
    predicted = decide(p, kind)
    is_target, is_predicted = _one_hot(t, num_classes), _one_hot(predicted, num_classes)
    support, claimed, hits = w @ is_target, w @ is_predicted, w @ (is_target * is_predicted)  # (s, c) each
    recall, precision, f1 = hits / support, hits / claimed, 2 * hits / (support + claimed)

    ranked = [1] if kind == "binary" else list(range(num_classes))
    per_class = [rank_metrics(p[:, c], is_target[:, c], w) for c in ranked]
    auc, ap = (np.stack(values, axis=1) for values in zip(*per_class, strict=True))

    metrics = {
        "auc": np.nanmean(auc, axis=1),
        "average_precision": np.nanmean(ap, axis=1),
        "f1_macro": np.nanmean(f1, axis=1),
        "accuracy": hits.sum(axis=1) / total,
        "balanced_accuracy": np.nanmean(recall, axis=1),
        "kappa": _kappa(hits.sum(axis=1), (support * claimed).sum(axis=1), total),
    }
    if kind != "binary":
        metrics["kappa_quadratic"] = _quadratic_kappa(w, t, predicted, support, claimed, total)
    if kind == "ordinal":
        metrics["mean_absolute_error"] = w @ np.abs(t - predicted).astype(np.float64) / total
    squared = (p[:, 1] - t) ** 2 if kind == "binary" else ((p - is_target) ** 2).sum(axis=1)
    of_truth = np.clip(p[np.arange(len(t)), t], _SMALLEST_PROBABILITY, 1)
    metrics["calibration_error"] = _calibration_error(*calibration_pairs(p, t, kind), w)[:, 0]
    metrics["brier"] = w @ squared / total
    metrics["log_loss"] = w @ -np.log(of_truth) / total
    if kind != "binary":
        metrics |= {f"auc/{names[c]}": auc[:, c] for c in range(num_classes)}
    return metrics | _by_name(names, recall=recall, precision=precision, f1=f1)


def _of_labels(p: Floats, t: Ints, w: Floats, names: Sequence[str]) -> dict[str, Floats]:
    total = w.sum(axis=1, keepdims=True)
    truth, predicted = t.astype(np.float64), decide(p, "multilabel").astype(np.float64)
    support, claimed, hits = w @ truth, w @ predicted, w @ (truth * predicted)
    rejections = total - support - claimed + hits  # true negatives
    agreed = hits + rejections
    recall, precision, f1 = hits / support, hits / claimed, 2 * hits / (support + claimed)
    by_chance = support * claimed + (total - support) * (total - claimed)
    auc, ap = (
        np.stack(values, axis=1)
        for values in zip(*(rank_metrics(p[:, c], truth[:, c], w) for c in range(p.shape[1])), strict=True)
    )
    clipped = np.clip(p, _SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY)
    log_loss = -(truth * np.log(clipped) + (1 - truth) * np.log1p(-clipped)).mean(axis=1)
    metrics = {
        "auc": np.nanmean(auc, axis=1),
        "average_precision": np.nanmean(ap, axis=1),
        "f1_macro": np.nanmean(f1, axis=1),
        "accuracy": (agreed / total).mean(axis=1),
        "subset_accuracy": w @ (truth == predicted).all(axis=1).astype(np.float64) / total[:, 0],
        "balanced_accuracy": np.nanmean((recall + rejections / (total - support)) / 2, axis=1),
        "kappa": np.nanmean(_kappa(agreed, by_chance, total), axis=1),
        "calibration_error": _calibration_error(p, truth, w).mean(axis=1),
        "brier": w @ ((p - truth) ** 2).mean(axis=1) / total[:, 0],
        "log_loss": w @ log_loss / total[:, 0],
    }
    metrics |= {f"auc/{name}": auc[:, c] for c, name in enumerate(names)}
    return metrics | _by_name(names, recall=recall, precision=precision, f1=f1)


def rank_metrics(scores: Floats, positive: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Area under the ROC curve and average precision, each (s,); NaN where a resample lacks positives or negatives.

    The area is the share of (positive, negative) pairs in the right order, ties counting one half; average precision is
    the step-wise sum of precision times the gain in recall, equal scores being one step.

    Args:
        scores: (n,); higher means more positive.
        positive: (n,) 0 or 1.
        weights: (s, n).
    """
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])  # first of each run of equal scores
    ordered, is_positive = weights[:, order], positive[order]
    up = np.add.reduceat(ordered * is_positive, starts, axis=1)  # (s, distinct scores)
    out = np.add.reduceat(ordered * (1 - is_positive), starts, axis=1)
    positives, negatives = np.cumsum(up, axis=1), np.cumsum(out, axis=1)
    num_positive, num_negative = positives[:, -1], negatives[:, -1]

    pairs = (up * (num_negative[:, None] - negatives + out / 2)).sum(axis=1)
    auc = pairs / (num_positive * num_negative)
    precision = positives / np.maximum(positives + negatives, 1)
    average_precision = (up * precision).sum(axis=1) / num_positive
    average_precision[num_negative == 0] = np.nan  # 1 by formula, but nothing was ranked
    return auc, average_precision


def _kappa(agreed: Floats, by_chance: Floats, total: Floats) -> Floats:
    """Cohen's kappa from the agreements, the sum of products of the margins, and the total."""
    expected = by_chance / total
    return (agreed - expected) / (total - expected)


def _quadratic_kappa(w: Floats, t: Ints, predicted: Ints, support: Floats, claimed: Floats, total: Floats) -> Floats:
    """Kappa with squared distances as weights, from moments of the margins: no (c, c) table per resample."""
    observed = w @ ((t - predicted) ** 2).astype(np.float64)
    level = np.arange(support.shape[1], dtype=np.float64)
    first, second = (support @ level, claimed @ level), (support @ level**2, claimed @ level**2)
    expected = second[0] + second[1] - 2 * first[0] * first[1] / total
    return 1 - observed / expected


def _calibration_error(stated: Floats, outcome: Floats, w: Floats) -> Floats:
    """Expected calibration error (s, columns): the mean distance of stated from observed, weighted by bin counts."""
    total = w.sum(axis=1)
    bins = calibration_bin(stated)
    columns = [
        np.abs(w @ (_one_hot(bins[:, c], CALIBRATION_BINS) * (stated[:, c] - outcome[:, c])[:, None])).sum(axis=1)
        / total
        for c in range(stated.shape[1])
    ]
    return np.stack(columns, axis=1)


def _one_hot(index: Ints, size: int) -> Floats:
    return (index[:, None] == np.arange(size)).astype(np.float64)


def _by_name(names: Sequence[str], **tables: Floats) -> dict[str, Floats]:
    return {f"{metric}/{name}": table[:, c] for metric, table in tables.items() for c, name in enumerate(names)}
