"""Cross-validation folds that are stratified by class and never put one patient on two sides."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError
from tasks.common.wording import quoted

logger = logging.getLogger(__name__)
Ints = NDArray[np.int64]
Labels = Sequence[Hashable] | NDArray[Any]


@dataclass(frozen=True)
class Fold:
    """Ids of one fold, each list sorted when made here and in file order when read.

    Attributes:
        train, val, test: ids; no id is in two of them. ``val`` may be empty.
        index: number of the fold, from 0 over all repeats.
        repeat: which repetition of the cross-validation it belongs to.
    """

    train: list[str]
    val: list[str]
    test: list[str]
    index: int = 0
    repeat: int = 0


def make_folds(
    ids: Sequence[str],
    labels: Labels | None = None,
    groups: Sequence[Hashable] | None = None,
    *,
    num_folds: int = 5,
    seed: int = 1,
    val_fraction: float = 0.1,
    repeats: int = 1,
    allow_rare: bool = False,
    group_word: str = "group",
) -> list[Fold]:
    """``repeats`` x ``num_folds`` folds; in each repeat every id is in exactly one test set.

    Groups are dealt out whole. With classes, a group counts as the class of most of its members (ties: the higher in
    sorted order) and the numbers of groups of a class in any two test sets differ by one at most, and so do the numbers
    of groups altogether; large groups are dealt first, so that sample counts come out even too. With a label matrix the
    deal is that of Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-label Data", 2011. The result
    depends on ``seed`` and on what the rows say, not on their order.

    Args:
        ids: (n,) distinct.
        labels: (n,) class of each id, or (n, c) 0/1 for several labels each; None for no stratification.
        groups: (n,) patient of each id; each id is its own group by default.
        val_fraction: share of the groups that are not tested, set aside for validation, stratified alike, at least
            one of each class that has two; 0 for none. If no class has two, ``val`` is empty and a warning is logged.
        allow_rare: accept a class with fewer groups than folds (some test sets will lack it).
        group_word: what a group is called in messages, such as ``patient``.

    Raises:
        InputError: an id appears twice; too few groups for the folds, altogether or of a class; a fold would train on a
            single class; or a number is out of range.
    """
    if num_folds < 2:
        raise InputError(
            f"crossval.folds={num_folds} is no cross-validation; use 2 or more, or give a split with crossval.splits."
        )
    if not 0 <= val_fraction < 1:
        raise InputError(f"crossval.val_fraction={val_fraction} must be at least 0 and below 1.")
    if repeats < 1:
        raise InputError(f"crossval.repeats={repeats} leaves nothing to do; use 1 or more.")
    cohort = _group(ids, labels, groups)
    _check_enough(cohort, num_folds, allow_rare, group_word)

    folds = []
    for repeat in range(repeats):
        part = _deal(cohort, [1 / num_folds] * num_folds, np.random.default_rng([seed, repeat]))
        for number in range(num_folds):
            tested = np.flatnonzero(part == number)
            rest = np.flatnonzero(part != number)
            rng = np.random.default_rng([seed, repeat, number])
            held_out = _hold_out(cohort.subset(rest), val_fraction, rng)
            train, val, test = (cohort.ids_of(g) for g in (rest[~held_out], rest[held_out], tested))
            fold = Fold(train, val, test, repeat * num_folds + number, repeat)
            if val_fraction and not val:
                logger.warning("fold %d: too few %ss to set any aside for validation", fold.index, group_word)
            folds.append(fold)
    check_folds(folds, ids, labels, groups, group_word=group_word)
    return folds


def with_validation(
    fold: Fold,
    ids: Sequence[str],
    labels: Labels | None = None,
    groups: Sequence[Hashable] | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 1,
) -> Fold:
    """``fold`` with a stratified, grouped share of its training ids moved to validation; for splits that have none."""
    row = {i: k for k, i in enumerate(ids)}
    rows = [row[i] for i in fold.train]
    some_labels = None if labels is None else [labels[r] for r in rows]
    cohort = _group(fold.train, some_labels, None if groups is None else [groups[r] for r in rows])
    held_out = _hold_out(cohort, val_fraction, np.random.default_rng([seed, fold.repeat, fold.index]))
    every = np.arange(len(cohort.names))
    train, val = cohort.ids_of(every[~held_out]), cohort.ids_of(every[held_out])
    return Fold(train, sorted([*fold.val, *val]), fold.test, fold.index, fold.repeat)


def check_folds(
    folds: Iterable[Fold],
    ids: Sequence[str],
    labels: Labels | None = None,
    groups: Sequence[Hashable] | None = None,
    *,
    source: str = "the split",
    group_word: str = "group",
    class_names: Sequence[str] | None = None,
) -> list[str]:
    """One sentence for each class that a fold's training, validation or test set lacks.

    Args:
        ids, labels, groups: as in :func:`make_folds`.
        source: where the folds came from, for messages.
        class_names: (c,) what the columns of a label matrix are called.

    Raises:
        InputError: an id or a group is on two sides of a fold, or a training set holds one class only.
    """
    class_of: dict[str, Any] = {} if labels is None else dict(zip(ids, _as_rows(labels), strict=True))
    group_of = {i: str(g) for i, g in zip(ids, groups if groups is not None else ids, strict=True)}
    every_class = _classes(class_of.values())
    is_matrix = any(isinstance(label, tuple) for label in class_of.values())
    notes = []
    for fold in folds:
        where = f"{source}, fold {fold.index}"
        sides = {"training": fold.train, "validation": fold.val, "test": fold.test}
        _refuse_shared(sides, {i: i for i in group_of}, where, "id")
        _refuse_shared(sides, group_of, where, group_word)
        if not class_of:
            continue
        if len({class_of[i] for i in fold.train}) == 1:
            of_class = "has the same labels" if is_matrix else f"is of class '{class_of[fold.train[0]]}'"
            raise InputError(
                f"{where}: every training sample {of_class}, so there is nothing to learn; "
                f"use fewer folds or add samples of another class."
            )
        for side, members in sides.items():
            missing = sorted(every_class - _classes(class_of[i] for i in members), key=str)
            if members and missing:
                named = [class_names[c] for c in missing] if is_matrix and class_names is not None else missing
                notes.append(f"{where}: no {side} sample of class {quoted(named)}.")
    return notes


@dataclass(frozen=True)
class _Cohort:
    """Groups in the order of their names.

    ``label`` (g,) is the class of most members; ``positive`` (g, c) marks labels that any member has, for label
    matrices, and is None for classes.
    """

    names: list[str]
    members: list[list[str]]
    size: Ints
    label: Ints
    positive: NDArray[np.bool_] | None
    classes: list[Hashable]

    def ids_of(self, groups: Ints) -> list[str]:
        return sorted(i for g in groups for i in self.members[g])

    def subset(self, keep: Ints) -> _Cohort:
        positive = None if self.positive is None else self.positive[keep]
        members = [self.members[g] for g in keep]
        return _Cohort(
            [self.names[g] for g in keep], members, self.size[keep], self.label[keep], positive, self.classes
        )


def _group(ids: Sequence[str], labels: Labels | None, groups: Sequence[Hashable] | None) -> _Cohort:
    for what, values in (("labels", labels), ("groups", groups)):
        if values is not None and len(values) != len(ids):
            raise ValueError(f"{len(values)} {what} for {len(ids)} ids")
    twice = sorted(i for i, count in Counter(ids).items() if count > 1)
    if twice:
        raise InputError(f"ids must be distinct, but {quoted(twice)} appear more than once.")
    if not len(ids):
        raise InputError("there is nothing to split: no sample has both data and a label.")
    rows = [()] * len(ids) if labels is None else _as_rows(labels)
    is_matrix = labels is not None and isinstance(rows[0], tuple)
    by_group: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups if groups is not None else ids):
        by_group[str(group)].append(row)
    names = sorted(by_group)
    members = [sorted(ids[r] for r in by_group[g]) for g in names]
    size = np.array([len(m) for m in members])
    if is_matrix:
        positive = np.array([np.array([rows[r] for r in by_group[g]]).max(axis=0) > 0 for g in names])
        return _Cohort(names, members, size, np.zeros(len(names), np.int64), positive, list(range(positive.shape[1])))
    classes = sorted(set(rows), key=str)
    code = {c: k for k, c in enumerate(classes)}
    label = np.array([_majority([code[rows[r]] for r in by_group[g]]) for g in names])
    return _Cohort(names, members, size, label, None, classes)


def _check_enough(cohort: _Cohort, num_folds: int, allow_rare: bool, word: str) -> None:
    num_groups = len(cohort.names)
    if num_groups < num_folds:
        raise InputError(
            f"crossval.folds={num_folds} needs {num_folds} {word}s at least, not {num_groups}; use fewer folds."
        )
    if cohort.positive is not None:
        return  # labels overlap, so a rare one does not starve a fold; check_folds reports where it is missing
    for count, c in sorted((int((cohort.label == k).sum()), k) for k in range(len(cohort.classes))):
        if len(cohort.classes) > 1 and (count < 2 or (count < num_folds and not allow_rare)):
            fewer = f"use crossval.folds={count} or fewer, " if count >= 2 else ""
            owned = f"{count} {word}" + ("" if count == 1 else "s")
            raise InputError(
                f"class '{cohort.classes[c]}' has {owned}, too few for crossval.folds={num_folds}; "
                f"{fewer}merge the class with another or leave it out."
            )


def _deal(cohort: _Cohort, shares: Sequence[float], rng: np.random.Generator) -> Ints:
    """The part (g,) that each group goes to; parts are equal."""
    if cohort.positive is not None:
        return _deal_by_labels(cohort, shares, rng)
    return _deal_by_class(cohort, _equal_quotas(cohort, len(shares), rng), rng)


def _hold_out(cohort: _Cohort, fraction: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which groups (g,) are set aside for validation."""
    if fraction == 0:
        return np.zeros(len(cohort.names), dtype=bool)
    if cohort.positive is not None:
        return _deal_by_labels(cohort, [1 - fraction, fraction], rng) == 1
    count = np.bincount(cohort.label, minlength=len(cohort.classes))
    held = _largest_remainder(count * fraction)
    held = np.clip(held, np.minimum(1, count // 2), np.maximum(count - 1, 0))
    return _deal_by_class(cohort, np.stack([count - held, held], axis=1), rng) == 1


def _equal_quotas(cohort: _Cohort, parts: int, rng: np.random.Generator) -> Ints:
    """Groups of each class that each part takes, (classes, parts): as equal as whole numbers can be.

    What is left over of a class goes to the parts with the fewest groups so far, which keeps the totals within one.
    """
    count = np.bincount(cohort.label, minlength=len(cohort.classes))
    quotas = np.repeat(count[:, None] // parts, parts, axis=1)
    total = np.zeros(parts, dtype=np.int64)
    for c in np.argsort(count, kind="stable"):
        order = np.lexsort((rng.random(parts), total))
        quotas[c, order[: count[c] % parts]] += 1
        total += quotas[c]
    return quotas


def _deal_by_class(cohort: _Cohort, quotas: Ints, rng: np.random.Generator) -> Ints:
    """Fill the quotas, largest groups first, each to the open part that has the fewest samples for its quota."""
    part = np.zeros(len(cohort.names), dtype=np.int64)
    share = np.maximum(quotas.sum(axis=0), 1)
    load = np.zeros(quotas.shape[1])
    for c in np.argsort(quotas.sum(axis=1), kind="stable"):
        members = rng.permutation(np.flatnonzero(cohort.label == c))
        left, load_of_class = quotas[c].copy(), np.zeros(quotas.shape[1])
        for g in members[np.argsort(-cohort.size[members], kind="stable")]:
            open_parts = np.flatnonzero(left)
            fill = load_of_class[open_parts] / quotas[c, open_parts]
            best = open_parts[np.lexsort((rng.random(len(open_parts)), load[open_parts] / share[open_parts], fill))[0]]
            part[g] = best
            left[best] -= 1
            load_of_class[best] += cohort.size[g]
            load[best] += cohort.size[g]
    return part


def _deal_by_labels(cohort: _Cohort, shares: Sequence[float], rng: np.random.Generator) -> Ints:
    """Iterative stratification: the rarest label first, each group to the part that most wants that label."""
    assert cohort.positive is not None
    none = ~cohort.positive.any(axis=1, keepdims=True)
    positive = np.concatenate([cohort.positive, none], axis=1)
    share = np.asarray(shares)
    wanted = np.tile(positive.sum(axis=0).astype(np.float64), (len(share), 1))  # (parts, labels), for a share of 1
    capacity = np.full(len(share), float(len(positive)))
    part = np.full(len(positive), -1)
    while (waiting := part < 0).any():
        count = positive[waiting].sum(axis=0)
        label = np.where(count > 0, count, len(positive) + 1).argmin()
        members = rng.permutation(np.flatnonzero(waiting & positive[:, label]))
        for g in members[np.argsort(-cohort.size[members], kind="stable")]:
            empty = np.setdiff1d(np.arange(len(shares)), part)
            candidates = empty if (part < 0).sum() <= len(empty) else np.arange(len(shares))  # leave no part empty
            keys = (rng.random(len(candidates)), -capacity[candidates], -wanted[candidates, label])
            best = candidates[np.lexsort(keys)[0]]
            part[g] = best
            wanted[best, positive[g]] -= 1 / share[best]
            capacity[best] -= 1 / share[best]
    return part


def _largest_remainder(exact: NDArray[np.floating]) -> Ints:
    """Whole numbers near ``exact`` whose sum is its rounded sum."""
    whole: Ints = np.floor(exact).astype(np.int64)
    missing = round(float(exact.sum())) - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:missing]] += 1
    return whole


def _majority(codes: list[int]) -> int:
    count = Counter(codes)
    return max(count, key=lambda c: (count[c], c))


def _as_rows(labels: Labels) -> list[Any]:
    """Each label as something hashable: a class, or a tuple of 0 and 1."""
    plain = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    return [tuple(int(v) for v in x) if isinstance(x, list | tuple | np.ndarray) else x for x in plain]


def _classes(labels: Iterable[Any]) -> set[Any]:
    """Classes that occur; for label rows, the columns with a positive."""
    found: set[Any] = set()
    for label in labels:
        found |= {c for c, on in enumerate(label) if on} if isinstance(label, tuple) else {label}
    return found


def _refuse_shared(sides: dict[str, list[str]], owner: dict[str, str], where: str, word: str) -> None:
    owners = {side: {owner[i] for i in members} for side, members in sides.items()}
    for a, b in (("training", "test"), ("training", "validation"), ("validation", "test")):
        shared = sorted(owners[a] & owners[b])
        if shared:
            are = "is" if len(shared) == 1 else "are"
            raise InputError(
                f"{where}: {word} {quoted(shared)} {are} in both the {a} and the {b} set; keep each {word} on one side."
            )
