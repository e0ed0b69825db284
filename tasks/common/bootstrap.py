"""How sure a metric is: bootstrap intervals over patients and, kept apart, the spread over folds or seeds."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.common.weighted_metrics import Floats, Ints, Kind, check_predictions, weighted_metrics

_BLOCK = 4_000_000  # weights held at once (32 MB)


@dataclass(frozen=True)
class Interval:
    """A bootstrap percentile interval.

    Attributes:
        low, high: the ends; NaN when no resample defined the metric.
        undefined: how many resamples left the metric undefined (one class only) and are not counted.
    """

    low: float
    high: float
    undefined: int = 0


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of a metric over folds or seeds; ``std`` is NaN for one value."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Metric of method a minus that of method b on the same cases.

    Attributes:
        value: the difference on all cases.
        low, high: percentile interval of the difference over resamples.
        p_value: two-sided share of resamples whose difference has the other sign; never below 2 / (resamples + 1).
    """

    value: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class GroupedPredictions:
    """One row per group (patient).

    Attributes:
        groups: names, sorted.
        probabilities: (g, c), mean over the members.
        targets: (g,), or (g, c) for multi-label.
        mixed: groups whose members do not all have the same target.
    """

    groups: list[str]
    probabilities: Floats
    targets: Ints
    mixed: list[str] = field(default_factory=list)


def bootstrap_intervals(
    probabilities: NDArray,
    targets: NDArray,
    kind: Kind,
    groups: Sequence[Hashable] | None = None,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    stratified: bool = False,
    classes: Sequence[str] | None = None,
) -> dict[str, Interval]:
    """Percentile interval of every metric of :func:`~tasks.common.metrics.classification_metrics`.

    Whole groups are drawn with replacement, so that several slides of a patient count as the one draw they are.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    Args:
        probabilities: (n, c).
        targets: (n,) class, or (n, c) 0/1 for ``multilabel``.
        groups: (n,) group of each row; each row is its own group by default.
        num_samples: resamples.
        level: share of resamples between the ends.
        stratified: draw within each class (the label combination, for ``multilabel``) of groups, so that every
            resample has the class sizes of the data.
        classes: names for per-class keys.

    Returns:
        name of the metric -> interval.
    """
    p, t = check_predictions(probabilities, targets, kind)
    check_sampling(num_samples, level)
    parts: list[dict[str, Floats]] = []
    for weights in resample_weights(t, groups, num_samples, seed, stratified):
        parts.append(weighted_metrics(p, t, kind, weights, classes))
    return {name: percentile_interval(np.concatenate([part[name] for part in parts]), level) for name in parts[0]}


def paired_difference(
    a: NDArray,
    b: NDArray,
    targets: NDArray,
    kind: Kind,
    groups: Sequence[Hashable] | None = None,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    stratified: bool = False,
    classes: Sequence[str] | None = None,
) -> dict[str, Difference]:
    """Every metric of predictions ``a`` minus that of ``b``, both resampled alike.

    ``a`` and ``b`` are (n, c) probabilities for the same rows; the rest is as in :func:`bootstrap_intervals`.
    """
    p, t = check_predictions(a, targets, kind)
    q, _ = check_predictions(b, targets, kind)
    check_sampling(num_samples, level)
    whole = np.ones((1, len(p)))
    parts = []
    for weights in itertools.chain([whole], resample_weights(t, groups, num_samples, seed, stratified)):
        ours, theirs = weighted_metrics(p, t, kind, weights, classes), weighted_metrics(q, t, kind, weights, classes)
        parts.append({name: ours[name] - theirs[name] for name in ours})
    found = {}
    for name, (value,) in parts[0].items():
        resampled = np.concatenate([part[name] for part in parts[1:]])
        interval = percentile_interval(resampled, level)
        found[name] = Difference(float(value), interval.low, interval.high, two_sided_p(resampled))
    return found


def mean_and_std(runs: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Mean and standard deviation of each metric over folds or seeds; undefined ones count nowhere, ``n`` included."""
    spreads = {}
    for name in {name: None for run in runs for name in run}:
        values = np.array([run[name] for run in runs if name in run and np.isfinite(run[name])])
        mean = float(values.mean()) if values.size else float("nan")
        std = float(values.std(ddof=1)) if values.size > 1 else float("nan")
        spreads[name] = Spread(mean, std, int(values.size))
    return spreads


def aggregate_by_group(
    probabilities: NDArray,
    targets: NDArray,
    groups: Sequence[Hashable],
    target: Literal["majority", "max"] = "majority",
) -> GroupedPredictions:
    """Mean probabilities of each group, with one target per group.

    Args:
        probabilities: (n, c).
        targets: (n,) class, or (n, c) 0/1 for multi-label.
        groups: (n,).
        target: what a group is called whose members differ: the commonest class (ties go to the higher one), or the
            highest.
    """
    t = np.asarray(targets).astype(np.int64)
    names, member, size = np.unique([str(g) for g in groups], return_inverse=True, return_counts=True)
    mean = _sum_by(member, np.asarray(probabilities, dtype=np.float64), len(names)) / size[:, None]
    votes = _sum_by(member, t if t.ndim == 2 else np.eye(t.max() + 1)[t], len(names))
    if t.ndim == 2:
        chosen = votes > 0 if target == "max" else votes * 2 >= size[:, None]
        mixed = ((votes > 0) & (votes < size[:, None])).any(axis=1)
    else:
        wins = votes > 0 if target == "max" else votes == votes.max(axis=1, keepdims=True)
        chosen = votes.shape[1] - 1 - wins[:, ::-1].argmax(axis=1)
        mixed = (votes > 0).sum(axis=1) > 1
    return GroupedPredictions(names.tolist(), mean, chosen.astype(np.int64), names[mixed].tolist())


def resample_weights(
    targets: Ints, groups: Sequence[Hashable] | None, num_samples: int, seed: int, stratified: bool = False
) -> Iterator[Floats]:
    """How many copies of each row each resample holds, in blocks (s, n) of a few megabytes.

    The draw depends on ``seed`` and the sorted group names only, not on the order of the rows when groups are named.
    """
    n = len(targets)
    if groups is not None and len(groups) != n:
        raise ValueError(f"{len(groups)} groups for {n} rows")
    member = np.arange(n) if groups is None else np.unique([str(g) for g in groups], return_inverse=True)[1]
    num_groups = int(member.max()) + 1
    strata = _strata(targets, member, num_groups) if stratified else [np.arange(num_groups)]
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // max(n, num_groups))
    for start in range(0, num_samples, rows):
        count = min(rows, num_samples - start)
        copies = np.zeros((count, num_groups))
        for stratum in strata:
            drawn = rng.integers(len(stratum), size=(count, len(stratum)))
            flat = np.bincount((drawn + len(stratum) * np.arange(count)[:, None]).ravel(), minlength=drawn.size)
            copies[:, stratum] = flat.reshape(count, len(stratum))
        yield copies if groups is None else copies[:, member]


def _strata(targets: Ints, member: Ints, num_groups: int) -> list[Ints]:
    """Groups by the class of most of their rows."""
    combination = targets if targets.ndim == 1 else np.unique(targets, axis=0, return_inverse=True)[1].ravel()
    votes = np.zeros((num_groups, int(combination.max()) + 1))
    np.add.at(votes, (member, combination), 1)
    group_class = votes.argmax(axis=1)
    return [np.flatnonzero(group_class == c) for c in np.unique(group_class)]


def percentile_interval(values: Floats, level: float) -> Interval:
    """The middle ``level`` of resampled values (s,); those that are not finite count as undefined."""
    defined = values[np.isfinite(values)]
    if not defined.size:
        return Interval(float("nan"), float("nan"), int(values.size))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), int(values.size - defined.size))


def two_sided_p(differences: Floats) -> float:
    """Twice the share of resampled differences (s,) on the rarer side of 0."""
    defined = differences[np.isfinite(differences)]
    if not defined.size:
        return float("nan")
    tail = min((defined <= 0).sum(), (defined >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (defined.size + 1)))


def _sum_by(member: Ints, values: NDArray, num_groups: int) -> Floats:
    total = np.zeros((num_groups, values.shape[1]))
    np.add.at(total, member, values)
    return total


def check_sampling(num_samples: int, level: float) -> None:
    """Raise ValueError for a number of resamples or a level that is not possible."""
    if num_samples < 1 or not 0 < level < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1 and level={level} between 0 and 1")
