"""The fast bootstrap is the slow one; groups stay together; spread over folds is another thing than an interval."""

import math
import time

import numpy as np
import pytest
from sklearn import metrics as sk

from tasks.common.bootstrap import (
    aggregate_by_group,
    bootstrap_intervals,
    mean_and_std,
    paired_difference,
    resample_weights,
)
from tasks.common.metrics import classification_metrics
from tasks.common.weighted_metrics import weighted_metrics
from tests.common.predictions import make_predictions


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel", "ordinal"])
@pytest.mark.parametrize("rounded", [False, True])
def test_each_resample_equals_the_metrics_of_its_rows(kind: str, rounded: bool) -> None:
    p, t = make_predictions(kind, 25, 4, rounded=rounded)  # so few that resamples lose classes
    weights = np.concatenate(list(resample_weights(t, None, 60, seed=3)))
    fast = weighted_metrics(p, t, kind, weights)
    for s, copies in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(25), copies)
        for name, value in classification_metrics(p[rows], t[rows], kind).items():
            assert fast[name][s] == pytest.approx(value, abs=1e-12, nan_ok=True), name


def test_resamples_equal_scikit_learn() -> None:
    p, t = make_predictions("multiclass", 120, 3)
    weights = np.concatenate(list(resample_weights(t, None, 25, seed=1)))
    fast = weighted_metrics(p, t, "multiclass", weights)
    for s, copies in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(120), copies)
        q, u, predicted = p[rows], t[rows], p[rows].argmax(1)
        assert fast["auc"][s] == pytest.approx(sk.roc_auc_score(u, q, multi_class="ovr"), abs=1e-12)
        assert fast["f1_macro"][s] == pytest.approx(sk.f1_score(u, predicted, average="macro"), abs=1e-12)
        assert fast["kappa"][s] == pytest.approx(sk.cohen_kappa_score(u, predicted), abs=1e-12)
        quadratic = sk.cohen_kappa_score(u, predicted, weights="quadratic")
        assert fast["kappa_quadratic"][s] == pytest.approx(quadratic, abs=1e-12)


def test_the_interval_is_the_percentiles_of_the_resamples() -> None:
    p, t = make_predictions("binary", 50)
    weights = np.concatenate(list(resample_weights(t, None, 200, seed=7)))
    values = weighted_metrics(p, t, "binary", weights)["accuracy"]
    interval = bootstrap_intervals(p, t, "binary", num_samples=200, level=0.9, seed=7)["accuracy"]
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(values, [0.05, 0.95])))
    assert interval.undefined == 0


def test_groups_are_drawn_whole() -> None:
    t = np.zeros(9, dtype=int)
    groups = ["a", "b", "b", "c", "c", "c", "d", "e", "f"]
    weights = np.concatenate(list(resample_weights(t, groups, 100, seed=0)))
    assert (weights[:, 1] == weights[:, 2]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    draws = weights[:, [0, 1, 3, 6, 7, 8]].sum(axis=1)  # one row of each of the six groups
    assert (draws == 6).all()


def test_copies_of_a_slide_do_not_narrow_the_interval_of_its_patient() -> None:
    p, t = make_predictions("binary", 40)
    groups = np.arange(40)
    once = bootstrap_intervals(p, t, "binary", groups.tolist(), seed=2)
    fourfold = bootstrap_intervals(p.repeat(4, 0), t.repeat(4), "binary", groups.repeat(4).tolist(), seed=2)
    naive = bootstrap_intervals(p.repeat(4, 0), t.repeat(4), "binary", seed=2)
    assert fourfold["accuracy"] == once["accuracy"]
    assert naive["accuracy"].high - naive["accuracy"].low < 0.7 * (once["accuracy"].high - once["accuracy"].low)


def test_the_order_of_rows_does_not_change_the_interval() -> None:
    p, t = make_predictions("binary", 40)
    groups = np.array([f"p{i // 2:02}" for i in range(40)])
    order = np.random.default_rng(1).permutation(40)
    a = bootstrap_intervals(p, t, "binary", groups.tolist(), seed=5)["auc"]
    b = bootstrap_intervals(p[order], t[order], "binary", groups[order].tolist(), seed=5)["auc"]
    assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=1e-12)


def test_a_stratified_draw_keeps_the_class_sizes() -> None:
    t = np.array([0] * 17 + [1] * 3)
    weights = np.concatenate(list(resample_weights(t, None, 50, seed=0, stratified=True)))
    assert (weights[:, t == 1].sum(axis=1) == 3).all()
    assert (weights[:, t == 0].sum(axis=1) == 17).all()
    labels = np.array([[0, 0]] * 5 + [[0, 1]] * 4 + [[1, 1]] * 3)
    weights = np.concatenate(list(resample_weights(labels, None, 50, seed=0, stratified=True)))
    assert (weights[:, :5].sum(axis=1) == 5).all()
    assert (weights[:, 9:].sum(axis=1) == 3).all()


def test_undefined_resamples_are_counted_and_never_silent() -> None:
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    found = bootstrap_intervals(p, np.array([0, 0, 1]), "binary", num_samples=500)
    assert 500 * (8 / 27 - 0.1) < found["auc"].undefined < 500 * (9 / 27 + 0.1)  # no positive 8/27, only positives 1/27
    assert found["auc"].low == 1.0
    single = bootstrap_intervals(p, np.array([0, 0, 0]), "binary", num_samples=20)["auc"]
    assert math.isnan(single.low)
    assert single.undefined == 20


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(120):
        t = rng.integers(2, size=80)
        right = rng.random(80) < 0.75
        one = np.where(right, t, 1 - t) * 0.8 + 0.1
        interval = bootstrap_intervals(np.stack([1 - one, one], 1), t, "binary", num_samples=300, seed=trial)[
            "accuracy"
        ]
        hits += interval.low <= 0.75 <= interval.high
    assert 0.86 <= hits / 120 <= 1.0


def test_blocks_of_resamples_are_all_there() -> None:
    t = make_predictions("binary", 9000)[1]
    blocks = list(resample_weights(t, None, 1000, seed=0))
    assert len(blocks) > 1
    assert sum(len(block) for block in blocks) == 1000
    assert all((block.sum(axis=1) == 9000).all() for block in blocks)


def test_a_thousand_resamples_of_a_thousand_cases_take_well_under_two_seconds() -> None:
    p, t = make_predictions("multiclass", 1000, 5)
    start = time.process_time()
    bootstrap_intervals(p, t, "multiclass", [f"p{i // 2}" for i in range(1000)])
    assert time.process_time() - start < 2


def test_a_method_beside_itself_differs_by_nothing() -> None:
    p, t = make_predictions("binary", 60)
    same = paired_difference(p, p, t, "binary", num_samples=100)["auc"]
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_a_better_method_is_better_with_certainty_and_the_sign_turns() -> None:
    p, t = make_predictions("binary", 200)
    chance = np.full_like(p, 0.5)
    better = paired_difference(p, chance, t, "binary", num_samples=200)["auc"]
    worse = paired_difference(chance, p, t, "binary", num_samples=200)["auc"]
    assert better.value == pytest.approx(classification_metrics(p, t, "binary")["auc"] - 0.5)
    assert 0 < better.low < better.value < better.high
    assert better.p_value == pytest.approx(2 / 201)
    assert (worse.value, worse.low, worse.high) == pytest.approx((-better.value, -better.high, -better.low))


def test_paired_differences_are_narrower_than_unpaired_ones() -> None:
    p, t = make_predictions("binary", 150)
    q = np.clip(p + np.random.default_rng(1).normal(0, 0.02, (150, 1)) * [1, -1], 0, 1)
    paired = paired_difference(p, q, t, "binary")["auc"]
    alone = bootstrap_intervals(p, t, "binary")["auc"]
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)


def test_mean_and_deviation_over_folds() -> None:
    spread = mean_and_std([{"auc": 0.8, "f1": 0.5}, {"auc": 0.9, "f1": float("nan")}, {"auc": 1.0}])
    assert (spread["auc"].mean, spread["auc"].n) == (pytest.approx(0.9), 3)
    assert spread["auc"].std == pytest.approx(0.1)  # n - 1
    assert (spread["f1"].mean, spread["f1"].n) == (0.5, 1)
    assert math.isnan(spread["f1"].std)
    assert math.isnan(mean_and_std([{"auc": float("nan")}])["auc"].mean)


def test_slides_of_a_patient_are_averaged() -> None:
    p = np.array([[0.2, 0.8], [0.6, 0.4], [0.9, 0.1], [0.5, 0.5]])
    found = aggregate_by_group(p, np.array([1, 1, 0, 1]), ["b", "b", "a", "c"])
    assert found.groups == ["a", "b", "c"]
    assert found.probabilities == pytest.approx(np.array([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]]))
    assert found.targets.tolist() == [0, 1, 1]
    assert found.mixed == []


def test_a_patient_with_mixed_slides_is_named_and_follows_the_rule() -> None:
    p = np.full((5, 3), 1 / 3)
    groups, t = ["a", "a", "a", "b", "b"], np.array([0, 0, 2, 0, 1])
    majority, highest = aggregate_by_group(p, t, groups), aggregate_by_group(p, t, groups, target="max")
    assert majority.targets.tolist() == [0, 1]  # the tie of b goes to the higher class
    assert highest.targets.tolist() == [2, 1]
    assert majority.mixed == ["a", "b"]
    labels = np.array([[1, 0], [0, 0], [0, 0], [1, 1], [0, 1]])
    assert aggregate_by_group(p[:, :2], labels, groups).targets.tolist() == [[0, 0], [1, 1]]
    assert aggregate_by_group(p[:, :2], labels, groups, "max").targets.tolist() == [[1, 0], [1, 1]]


def test_numbers_that_make_no_sense_are_refused() -> None:
    p, t = make_predictions("binary", 5)
    with pytest.raises(ValueError, match=r"level=1\.5"):
        bootstrap_intervals(p, t, "binary", level=1.5)
    with pytest.raises(ValueError, match="num_samples=0"):
        bootstrap_intervals(p, t, "binary", num_samples=0)
    with pytest.raises(ValueError, match="2 groups for 5 rows"):
        bootstrap_intervals(p, t, "binary", ["a", "b"])
