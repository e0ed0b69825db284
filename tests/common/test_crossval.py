"""Folds leak no patient, test every id once per repeat, are as even as whole groups allow, and ignore row order."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import InputError
from tasks.common.crossval import Fold, check_folds, make_folds, with_validation


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[str], list[str], list[str], int]:
    """Ids, classes and patients; every class has as many patients of its own as there are folds, some share classes."""
    num_folds = draw(st.integers(2, 5))
    sizes = draw(st.lists(st.lists(st.integers(1, 4), min_size=num_folds, max_size=12), min_size=2, max_size=4))
    ids, labels, groups = [], [], []
    for c, patients in enumerate(sizes):
        for p, size in enumerate(patients):
            for s in range(size):
                ids.append(f"{c}{p:02}{s}")
                # one slide in a patient of three or more is of another class: the majority decides
                labels.append(f"c{(c + 1) % len(sizes) if s == 2 else c}")
                groups.append(f"patient {c}-{p}")
    return ids, labels, groups, num_folds


@settings(deadline=None, max_examples=60)
@given(cohorts(), st.integers(0, 99), st.sampled_from([0.0, 0.1, 0.25]))
def test_no_leak_every_id_tested_once_and_classes_even(
    cohort: tuple[list[str], list[str], list[str], int], seed: int, val_fraction: float
) -> None:
    ids, labels, groups, k = cohort
    folds = make_folds(ids, labels, groups, num_folds=k, seed=seed, val_fraction=val_fraction, repeats=2)
    assert [(f.index, f.repeat) for f in folds] == [(i, i // k) for i in range(2 * k)]
    group_of, first_class = dict(zip(ids, groups, strict=True)), {g: f"c{g.split()[1].split('-')[0]}" for g in groups}
    for repeat in range(2):
        tested = Counter(i for f in folds if f.repeat == repeat for i in f.test)
        assert tested == Counter(ids)
    for fold in folds:
        assert sorted(fold.train + fold.val + fold.test) == sorted(ids)
        sides = [{group_of[i] for i in side} for side in (fold.train, fold.val, fold.test)]
        assert sum(map(len, sides)) == len(set(groups))  # no group on two sides
        if not val_fraction:
            assert fold.val == []
        else:
            held, kept = (Counter(first_class[g] for g in side) for side in (sides[1], sides[0]))
            for c in set(first_class.values()):
                total = held[c] + kept[c]
                assert kept[c] >= 1
                assert (held[c] >= 1) == (total >= 2)
                assert abs(held[c] - total * val_fraction) < 1 + 1e-9
    for c in set(first_class.values()):
        per_fold = [len({group_of[i] for i in f.test if first_class[group_of[i]] == c}) for f in folds[:k]]
        assert max(per_fold) - min(per_fold) <= 1
    all_groups = [len({group_of[i] for i in f.test}) for f in folds[:k]]
    assert max(all_groups) - min(all_groups) <= 1


@settings(deadline=None, max_examples=25)
@given(cohorts(), st.integers(0, 99))
def test_the_order_of_rows_does_not_matter_and_the_seed_does(
    cohort: tuple[list[str], list[str], list[str], int], seed: int
) -> None:
    ids, labels, groups, k = cohort
    order = np.random.default_rng(seed).permutation(len(ids))
    shuffled = ([values[i] for i in order] for values in (ids, labels, groups))
    assert make_folds(*shuffled, num_folds=k, seed=seed) == make_folds(ids, labels, groups, num_folds=k, seed=seed)


def test_another_seed_and_another_repeat_give_other_folds() -> None:
    ids = [f"{i:03}" for i in range(60)]
    labels = [i % 2 for i in range(60)]
    one = make_folds(ids, labels, seed=1, repeats=2)
    assert one == make_folds(ids, labels, seed=1, repeats=2)
    assert one[0].test != make_folds(ids, labels, seed=2)[0].test
    assert one[0].test != one[5].test
    assert one[:5] == make_folds(ids, labels, seed=1)


def test_sample_counts_are_even_where_patients_differ_in_size() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat([f"p{i:03}" for i in range(80)], rng.integers(1, 9, size=80))
    labels = [int(g[1:]) % 2 for g in groups]
    folds = make_folds([f"s{i}" for i in range(len(groups))], labels, groups.tolist(), num_folds=4)
    sizes = [len(f.test) for f in folds]
    assert max(sizes) - min(sizes) <= 4


def test_without_labels_folds_are_even() -> None:
    folds = make_folds([str(i) for i in range(11)], num_folds=3, val_fraction=0)
    assert sorted(len(f.test) for f in folds) == [3, 4, 4]
    assert all(f.val == [] for f in folds)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000))
def test_label_matrices_are_dealt_evenly_and_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [f"p{i // 2:03}" for i in range(160)]
    labels = (rng.random((160, 4)) < [0.5, 0.3, 0.15, 0.08]).astype(int)
    ids = [f"{i:03}" for i in range(160)]
    folds = make_folds(ids, labels, groups, num_folds=4, seed=seed, val_fraction=0.2)
    assert Counter(i for f in folds for i in f.test) == Counter(ids)
    group_of = dict(zip(ids, groups, strict=True))
    positive = {g: np.zeros(4, int) for g in groups}
    for i, row in enumerate(labels):
        positive[groups[i]] |= row
    total = np.sum(list(positive.values()), axis=0)
    for fold in folds:
        sides = [{group_of[i] for i in side} for side in (fold.train, fold.val, fold.test)]
        assert sum(map(len, sides)) == 80
        tested = np.sum([positive[g] for g in sides[2]], axis=0)
        assert (np.abs(tested - total / 4) <= 3).all()
        assert 5 <= len(sides[1]) <= 19  # a fifth of sixty


def test_no_part_is_left_empty_when_every_label_set_is_its_own() -> None:
    folds = make_folds(["a", "b", "c"], np.eye(3, dtype=int), num_folds=3, val_fraction=0)
    assert sorted(f.test for f in folds) == [["a"], ["b"], ["c"]]


def test_validation_can_be_set_aside_from_a_split_without_any() -> None:
    ids = [f"{i:02}" for i in range(40)]
    labels, groups = [i % 2 for i in range(40)], [f"p{i // 4}" for i in range(40)]
    labels = [int(g[1:]) % 2 for g in groups]
    fold = with_validation(Fold(ids[:32], [], ids[32:], 3), ids, labels, groups, val_fraction=0.25)
    assert fold.index == 3
    assert fold.test == ids[32:]
    assert sorted(fold.train + fold.val) == ids[:32]
    assert {labels[int(i)] for i in fold.val} == {0, 1}
    assert not {groups[int(i)] for i in fold.val} & {groups[int(i)] for i in fold.train}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_folds": 1}, r"crossval\.folds=1 is no cross-validation; use 2 or more"),
        ({"val_fraction": 1.0}, r"crossval\.val_fraction=1\.0 must be at least 0 and below 1"),
        ({"repeats": 0}, r"crossval\.repeats=0 leaves nothing to do"),
        ({"num_folds": 9}, r"crossval\.folds=9 needs 9 patients at least, not 8; use fewer folds"),
        (
            {"num_folds": 5},
            r"class 'b' has 3 patients, too few for crossval\.folds=5; use crossval\.folds=3 or fewer, merge",
        ),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(options: dict[str, float], sentence: str) -> None:
    ids, labels = list("12345678"), list("aaaaabbb")
    with pytest.raises(InputError, match=sentence):
        make_folds(ids, labels, group_word="patient", **options)  # type: ignore[arg-type]


def test_a_class_with_one_patient_cannot_be_in_both_training_and_test() -> None:
    labels, groups = list("aaaabb"), ["1", "2", "3", "4", "5", "5"]
    with pytest.raises(InputError, match=r"class 'b' has 1 patient, too few for crossval\.folds=2; merge the class"):
        make_folds(list("uvwxyz"), labels, groups, num_folds=2, allow_rare=True, group_word="patient")


def test_a_rare_class_may_be_allowed_and_is_then_reported() -> None:
    ids, labels = [f"{i:02}" for i in range(20)], ["a"] * 17 + ["b"] * 3
    folds = make_folds(ids, labels, num_folds=5, allow_rare=True, val_fraction=0)
    notes = check_folds(folds, ids, labels, source="crossval.folds=5")
    without = [f.index for f in folds if not set(f.test) & set(ids[17:])]
    assert len(without) == 2
    assert notes == [f"crossval.folds=5, fold {k}: no test sample of class 'b'." for k in without]


def test_ids_must_be_distinct() -> None:
    with pytest.raises(InputError, match="ids must be distinct, but 'a' appear more than once"):
        make_folds(["a", "b", "a"], num_folds=2)


def test_an_empty_cohort_is_a_sentence() -> None:
    with pytest.raises(InputError, match="there is nothing to split"):
        make_folds([], num_folds=2)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="1 labels for 2 ids"):
        make_folds(["a", "b"], ["x"], num_folds=2)


IDS, LABELS, GROUPS = list("abcdef"), list("xyxyxy"), ["p1", "p1", "p2", "p2", "p3", "p3"]


@pytest.mark.parametrize(
    ("fold", "sentence"),
    [
        (Fold(["a", "c"], [], ["b", "e"], 4), "s.csv, fold 4: patient 'p1' is in both the training and the test set"),
        (Fold(["a", "b"], ["c"], ["d"]), "patient 'p2' is in both the validation and the test set"),
        (Fold(["a", "c"], ["b", "d"], ["e"]), "patient 'p1', 'p2' are in both the training and the validation set"),
        (Fold(["a"], ["a"], ["e"]), "id 'a' is in both the training and the validation set"),
        (Fold(["a"], [], ["e", "f"]), "every training sample is of class 'x', so there is nothing to learn"),
    ],
)
def test_a_bad_split_is_refused_by_name(fold: Fold, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check_folds([fold], IDS, LABELS, GROUPS, source="s.csv", group_word="patient")


def test_missing_classes_are_reported_not_refused() -> None:
    fold = Fold(["a", "b"], ["c"], ["e"])
    assert check_folds([fold], IDS, LABELS, GROUPS, source="s.csv") == [
        "s.csv, fold 0: no validation sample of class 'y'.",
        "s.csv, fold 0: no test sample of class 'y'.",
    ]
    assert check_folds([fold], IDS) == []


def test_labels_of_a_matrix_are_reported_by_name_and_constant_ones_refused() -> None:
    labels = np.array([[1, 0], [0, 1], [1, 0], [1, 1], [1, 0], [1, 0]])
    notes = check_folds([Fold(["a", "b"], ["c"], ["d"])], IDS, labels, class_names=["necrosis", "mitosis"])
    assert notes == ["the split, fold 0: no validation sample of class 'mitosis'."]
    with pytest.raises(InputError, match="every training sample has the same labels"):
        check_folds([Fold(["a", "c"], [], ["d"])], IDS, labels)


def test_too_few_patients_for_a_validation_set_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    folds = make_folds(list("abcd"), list("xxyy"), num_folds=2, group_word="patient")
    assert [fold.val for fold in folds] == [[], []]
    assert caplog.messages == [f"fold {k}: too few patients to set any aside for validation" for k in (0, 1)]
