"""How well class probabilities match the truth: one dictionary of numbers, and a note for each that is undefined."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.common.weighted_metrics import Ints, Kind, check_predictions, weighted_metrics
from tasks.common.wording import quoted

# How each metric is written for a reader, in the order of a table.
METRIC_LABELS = {
    "auc": "AUC",
    "average_precision": "Average precision",
    "f1_macro": "F1 (macro)",
    "accuracy": "Accuracy",
    "accuracy_top5": "Accuracy (top 5)",
    "subset_accuracy": "Subset accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "kappa": "Cohen's κ",
    "kappa_quadratic": "Quadratic κ",
    "mean_absolute_error": "Mean absolute error",
    "calibration_error": "Calibration error (ECE)",
    "brier": "Brier score",
    "log_loss": "Log loss",
}
SMALLER_IS_BETTER = frozenset({"mean_absolute_error", "calibration_error", "brier", "log_loss"})


class Metrics(dict[str, float]):
    """Metrics by name, with ``notes``: one sentence for each value that is undefined or leaves a class out."""

    def __init__(self, values: dict[str, float], notes: list[str]) -> None:
        super().__init__(values)
        self.notes = notes


def classification_metrics(
    probabilities: NDArray, targets: NDArray, kind: Kind, classes: Sequence[str] | None = None
) -> Metrics:
    """All metrics of one set of predictions.

    ``auc`` and ``average_precision`` are those of class 1 for ``binary`` and macro means of one-versus-rest otherwise,
    leaving out classes of which there is no sample or nothing else. ``f1_macro`` averages the classes that were seen or
    predicted, ``balanced_accuracy`` the recall of those seen. Decisions are the arg-max, or 0.5 per label; no threshold
    is fitted. ``kappa`` is Cohen's, ``kappa_quadratic`` (``multiclass``, ``ordinal``) weights by squared distance.
    ``calibration_error`` is the expected calibration error over ten bins. ``brier`` is the squared error of class 1 for
    ``binary``, summed over classes otherwise. ``multilabel`` means are over labels; ``accuracy`` is per label and
    ``subset_accuracy`` asks for the whole row. ``recall/NAME``, ``precision/NAME``, ``f1/NAME`` and, beyond two
    classes, ``auc/NAME`` are per class.

    Args:
        probabilities: (n, c) float in [0, 1]; rows sum to 1 except for ``multilabel``.
        targets: (n,) int class, or (n, c) 0/1 for ``multilabel``.
        kind: ``binary`` (c = 2), ``multiclass``, ``multilabel`` or ``ordinal`` (classes in order).
        classes: names used in per-class keys and notes; numbers by default.

    Returns:
        name -> value; NaN where it is undefined, with the reason in ``.notes``.

    Raises:
        InputError: the probabilities hold NaN or infinity, or ``kind`` is unknown.
        ValueError: the shapes or values do not fit.

    >>> found = classification_metrics(np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]), np.array([0, 0, 1]), "binary")
    >>> found["auc"], round(found["accuracy"], 3), found.notes
    (1.0, 0.667, [])
    """
    p, t = check_predictions(probabilities, targets, kind)
    names = [str(c) for c in classes] if classes is not None else [str(i) for i in range(p.shape[1])]
    if len(names) != p.shape[1]:
        raise ValueError(f"{len(names)} class names for {p.shape[1]} columns of probabilities")
    values = {k: float(v[0]) for k, v in weighted_metrics(p, t, kind, np.ones((1, len(p))), names).items()}
    return Metrics(values, _left_out(t, kind, names) + _undefined(values))


def _left_out(targets: Ints, kind: Kind, names: Sequence[str]) -> list[str]:
    """Classes without samples, or without samples of anything else, which macro means leave out."""
    if kind == "multilabel":
        positives = targets.sum(axis=0)
    else:
        positives = np.bincount(targets, minlength=len(names))
    absent = [n for n, count in zip(names, positives, strict=True) if count == 0]
    constant = [n for n, count in zip(names, positives, strict=True) if count == len(targets)]
    notes = []
    if absent:
        notes.append(f"no sample of {quoted(absent)}: left out of AUC, average precision and recall.")
    if constant:
        notes.append(f"every sample is {quoted(constant)}: left out of AUC and average precision.")
    return notes


def _undefined(values: dict[str, float]) -> list[str]:
    undefined = [name for name, value in values.items() if math.isnan(value)]
    return [f"undefined here: {', '.join(undefined)}."] if undefined else []
