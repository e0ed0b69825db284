"""How sure a segmentation metric is: whole patients are drawn again, for means and for pooled ratios alike.

A statistic is a function from weights (s, n), how many copies of each case a resample holds, to values (s,) by name.
A row of ones gives the plain metric, so that value and interval cannot disagree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from kernels.errors import InputError
from tasks.common.bootstrap import (
    Difference,
    Interval,
    check_sampling,
    percentile_interval,
    resample_weights,
    two_sided_p,
)
from tasks.common.segmentation.patientwise import (
    Convention,
    Detections,
    Flags,
    detection_rates,
    detections,
    weighted_mean,
)
from tasks.common.wording import quoted

Floats = NDArray[np.float64]
Statistics = Callable[[Floats], Mapping[str, Floats]]

PATIENT_RATES = ("recall", "precision", "f1", "specificity", "accuracy", "balanced_accuracy")


@dataclass(frozen=True)
class Found:
    """When a patient's structure counts as found; see :func:`tasks.common.segmentation.patientwise.detections`."""

    convention: Convention = "tp"
    volume_limit_ml: float = 0.0
    overlap: float = 0.0


def statistic_intervals(
    statistics: Statistics,
    cases: int,
    groups: Sequence[Hashable] | None = None,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile interval of every statistic over resamples of groups (patients).

    Args:
        statistics: maps weights (s, n) to values (s,) by name.
        cases: n.
        groups: (n,) patient of each case, drawn as one; each case is its own by default.
        num_samples: resamples.
        level: share of resamples between the ends.
    """
    _check(cases, num_samples, level)
    parts = [statistics(w) for w in resample_weights(np.zeros(cases, np.int64), groups, num_samples, seed)]
    return {name: percentile_interval(np.concatenate([part[name] for part in parts]), level) for name in parts[0]}


def statistic_differences(
    ours: Statistics,
    theirs: Statistics,
    cases: int,
    groups: Sequence[Hashable] | None = None,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Every statistic of one run minus that of another on the same cases, both resampled alike."""
    _check(cases, num_samples, level)
    weights = resample_weights(np.zeros(cases, np.int64), groups, num_samples, seed)
    parts = []
    for w in itertools.chain([np.ones((1, cases))], weights):
        a, b = ours(w), theirs(w)
        parts.append({name: a[name] - b[name] for name in a if name in b})
    found = {}
    for name, (value,) in parts[0].items():
        resampled = np.concatenate([part[name] for part in parts[1:]])
        ends = percentile_interval(resampled, level)
        found[name] = Difference(float(value), ends.low, ends.high, two_sided_p(resampled))
    return found


def mean_intervals(
    values: Mapping[str, ArrayLike], groups: Sequence[Hashable] | None = None, **sampling: float
) -> dict[str, Interval]:
    """Intervals of the means of columns (n,); NaN counts nowhere. ``sampling`` as in :func:`statistic_intervals`."""
    columns = {name: np.asarray(column, dtype=np.float64) for name, column in values.items()}
    cases = len(next(iter(columns.values()))) if columns else 0
    return statistic_intervals(lambda w: _means(columns, w), cases, groups, **sampling)  # type: ignore[arg-type]


def ratio_intervals(
    ratios: Mapping[str, tuple[ArrayLike, ArrayLike]], groups: Sequence[Hashable] | None = None, **sampling: float
) -> dict[str, Interval]:
    """Intervals of pooled ratios: the sum of (n,) numerators over the sum of (n,) denominators.

    Object-wise recall over a cohort is such a ratio, of objects found in each case over objects in each case.
    """
    pairs = {name: [np.asarray(part, dtype=np.float64) for part in pair] for name, pair in ratios.items()}
    cases = len(next(iter(pairs.values()))[0]) if pairs else 0

    def statistics(w: Floats) -> dict[str, Floats]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: (w @ numerator) / (w @ denominator) for name, (numerator, denominator) in pairs.items()}

    return statistic_intervals(statistics, cases, groups, **sampling)  # type: ignore[arg-type]


def case_statistics(
    table: pd.DataFrame, metrics: Sequence[str], found: Found | None = None, where: Flags | None = None
) -> Statistics:
    """Means of the columns ``metrics`` and, with ``found``, the patient-wise rates and Dice-TP of a table of cases.

    Args:
        table: one row for each case; with ``found``, columns ``dice``, ``reference_ml`` and ``predicted_ml``.
        metrics: columns to average.
        found: when a case counts as found; None leaves the patient-wise metrics out.
        where: (n,) cases that count; the others keep their place in the resamples and weigh nothing.
    """
    columns = {name: table[name].to_numpy(np.float64) for name in metrics}
    outcome, good = (None, None) if found is None else _outcome(table, found)

    def statistics(weights: Floats) -> dict[str, Floats]:
        w = weights if where is None else weights * where
        values = _means(columns, w)
        if outcome is not None and good is not None:
            rates = detection_rates(outcome, w)
            values |= {f"patient_{name}": rates[name] for name in PATIENT_RATES}
            values["dice_tp"] = weighted_mean(np.where(good, table["dice"].to_numpy(np.float64), np.nan), w)
        return values

    return statistics


def compare_cases(
    a: pd.DataFrame,
    b: pd.DataFrame,
    metrics: Sequence[str],
    found: Found | None = None,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Metrics of run ``a`` minus those of run ``b``, on the same cases, with paired intervals and p-values.

    Args:
        a, b: tables with ``case_id`` and ``patient`` besides the metrics; rows in any order.

    Raises:
        InputError: the runs hold different cases.
    """
    first, second = a.set_index("case_id"), b.set_index("case_id")
    alone = sorted(set(first.index) ^ set(second.index))
    if alone or not (first.index.is_unique and second.index.is_unique):
        shown = quoted(alone) if alone else "a case twice"
        raise InputError(
            f"the two runs do not hold the same cases, each once ({shown}); evaluate both on one data set."
        )
    second = second.loc[first.index]
    return statistic_differences(
        case_statistics(first, metrics, found),
        case_statistics(second, metrics, found),
        len(first),
        list(first["patient"]) if "patient" in first else None,
        num_samples,
        level,
        seed,
    )


def _means(columns: Mapping[str, Floats], weights: Floats) -> dict[str, Floats]:
    return {name: weighted_mean(column, weights) for name, column in columns.items()}


def _outcome(table: pd.DataFrame, found: Found) -> tuple[Detections, Flags]:
    """What became of each case, and which are found with a reference above the limit."""
    dice, reference, predicted = (table[n].to_numpy(np.float64) for n in ("dice", "reference_ml", "predicted_ml"))
    outcome = detections(dice, reference, predicted, found.convention, found.volume_limit_ml, found.overlap)
    return outcome, (dice > found.overlap) & (reference > found.volume_limit_ml)


def _check(cases: int, num_samples: int, level: float) -> None:
    check_sampling(num_samples, level)
    if cases < 1:
        raise InputError("there are no cases to summarise.")
