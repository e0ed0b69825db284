"""Metrics agree with scikit-learn, torchmetrics and work by hand, and own up to what is undefined."""

import math

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as tm
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from kernels.errors import InputError
from tasks.common.concordance import concordance_index
from tasks.common.metrics import METRIC_LABELS, SMALLER_IS_BETTER, classification_metrics
from tests.common.predictions import make_predictions


@pytest.mark.parametrize("rounded", [False, True])
def test_binary_metrics_are_those_of_scikit_learn(rounded: bool) -> None:
    p, t = make_predictions("binary", 83, rounded=rounded)
    found = classification_metrics(p, t, "binary")
    predicted = p.argmax(1)
    expected = {
        "auc": sk.roc_auc_score(t, p[:, 1]),
        "average_precision": sk.average_precision_score(t, p[:, 1]),
        "f1_macro": sk.f1_score(t, predicted, average="macro"),
        "accuracy": sk.accuracy_score(t, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(t, predicted),
        "kappa": sk.cohen_kappa_score(t, predicted),
        "brier": sk.brier_score_loss(t, p[:, 1]),
        "log_loss": sk.log_loss(t, p),
        "recall/1": sk.recall_score(t, predicted),
        "recall/0": sk.recall_score(t, predicted, pos_label=0),
        "precision/1": sk.precision_score(t, predicted),
        "f1/1": sk.f1_score(t, predicted),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert found.notes == []


@pytest.mark.parametrize("kind", ["multiclass", "ordinal"])
@pytest.mark.parametrize("rounded", [False, True])
def test_multi_class_metrics_are_those_of_scikit_learn(kind: str, rounded: bool) -> None:
    p, t = make_predictions(kind, 91, 5, rounded=rounded)
    found = classification_metrics(p, t, kind)
    predicted = p.argmax(1)
    one_hot = np.eye(5)[t]
    expected = {
        "auc": sk.roc_auc_score(t, p, multi_class="ovr", average="macro"),
        "auc/3": sk.roc_auc_score(t == 3, p[:, 3]),
        "average_precision": sk.average_precision_score(one_hot, p, average="macro"),
        "f1_macro": sk.f1_score(t, predicted, average="macro"),
        "accuracy": sk.accuracy_score(t, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(t, predicted),
        "kappa": sk.cohen_kappa_score(t, predicted),
        "kappa_quadratic": sk.cohen_kappa_score(t, predicted, weights="quadratic"),
        "log_loss": sk.log_loss(t, p),
        "brier": np.square(p - one_hot).sum(1).mean(),
    }
    if kind == "ordinal":
        expected["mean_absolute_error"] = np.abs(t - predicted).mean()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_multi_label_metrics_are_those_of_scikit_learn() -> None:
    p, t = make_predictions("multilabel", 77, 4)
    found = classification_metrics(p, t, "multilabel")
    predicted = (p > 0.5).astype(int)
    expected = {
        "auc": sk.roc_auc_score(t, p, average="macro"),
        "average_precision": sk.average_precision_score(t, p, average="macro"),
        "f1_macro": sk.f1_score(t, predicted, average="macro"),
        "accuracy": 1 - sk.hamming_loss(t, predicted),
        "subset_accuracy": sk.accuracy_score(t, predicted),
        "balanced_accuracy": np.mean([sk.balanced_accuracy_score(t[:, c], predicted[:, c]) for c in range(4)]),
        "kappa": np.mean([sk.cohen_kappa_score(t[:, c], predicted[:, c]) for c in range(4)]),
        "brier": np.mean([sk.brier_score_loss(t[:, c], p[:, c]) for c in range(4)]),
        "log_loss": np.mean([sk.log_loss(t[:, c], p[:, c]) for c in range(4)]),
        "recall/2": sk.recall_score(t[:, 2], predicted[:, 2]),
        "precision/2": sk.precision_score(t[:, 2], predicted[:, 2]),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    p, t = make_predictions("binary", 200)
    q, u = make_predictions("multiclass", 200, 4)
    two = tm.binary_calibration_error(torch.tensor(p[:, 1]), torch.tensor(t), n_bins=10, norm="l1")
    four = tm.multiclass_calibration_error(torch.tensor(q), torch.tensor(u), num_classes=4, n_bins=10, norm="l1")
    assert classification_metrics(p, t, "binary")["calibration_error"] == pytest.approx(float(two), abs=1e-6)
    assert classification_metrics(q, u, "multiclass")["calibration_error"] == pytest.approx(float(four), abs=1e-6)


def test_numbers_worked_out_by_hand() -> None:
    one = np.array([0.1, 0.4, 0.4, 0.9])
    found = classification_metrics(np.stack([1 - one, one], 1), np.array([0, 0, 1, 1]), "binary")
    assert found["auc"] == 3.5 / 4  # one of four pairs ties
    assert found["average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found["accuracy"] == 0.75
    assert found["recall/1"] == 0.5
    assert found["precision/1"] == 1.0
    assert found["kappa"] == 0.5
    assert found["brier"] == pytest.approx((0.01 + 0.16 + 0.36 + 0.01) / 4)
    assert found["calibration_error"] == pytest.approx((0.1 + 2 * abs(0.4 - 0.5) + 0.1) / 4)


def test_a_tie_at_one_half_is_decided_for_the_lower_class() -> None:
    half = np.full((2, 2), 0.5)
    assert classification_metrics(half, np.array([0, 1]), "binary")["recall/0"] == 1.0
    assert classification_metrics(half, np.array([[1, 0], [1, 0]]), "multilabel")["recall/0"] == 0.0


def test_certain_and_right_is_perfect_and_certain_and_wrong_is_finite() -> None:
    t = np.array([0, 1, 2, 0])
    right = classification_metrics(np.eye(3)[t], t, "ordinal")
    for name in METRIC_LABELS.keys() & right.keys():
        assert right[name] == (0 if name in SMALLER_IS_BETTER else 1), name
    wrong = classification_metrics(np.eye(3)[(t + 1) % 3], t, "multiclass")
    assert wrong["accuracy"] == 0
    assert wrong["log_loss"] == pytest.approx(-math.log(np.finfo(float).eps))


@given(st.integers(0, 10_000), st.sampled_from(["binary", "multiclass", "multilabel", "ordinal"]))
def test_the_order_of_rows_and_monotone_scores_do_not_matter(seed: int, kind: str) -> None:
    p, t = make_predictions(kind, 30, seed=seed)
    order = np.random.default_rng(seed).permutation(30)
    found, shuffled = classification_metrics(p, t, kind), classification_metrics(p[order], t[order], kind)
    assert found.keys() == shuffled.keys()
    for name in found:
        assert shuffled[name] == pytest.approx(found[name], abs=1e-9, nan_ok=True), name
    if kind == "binary":
        squared = np.stack([1 - p[:, 1] ** 2, p[:, 1] ** 2], 1)
        assert classification_metrics(squared, t, kind)["auc"] == pytest.approx(found["auc"], abs=1e-12)


def test_a_single_class_leaves_metrics_undefined_and_says_which() -> None:
    p = np.array([[0.8, 0.2], [0.3, 0.7]])
    found = classification_metrics(p, np.array([1, 1]), "binary", ["benign", "malignant"])
    assert math.isnan(found["auc"])
    assert math.isnan(found["average_precision"])
    assert found["accuracy"] == 0.5
    assert "no sample of 'benign': left out of AUC, average precision and recall." in found.notes
    assert "every sample is 'malignant': left out of AUC and average precision." in found.notes
    assert found.notes[-1] == "undefined here: auc, average_precision, recall/benign."


def test_an_absent_class_is_left_out_of_macro_means_and_named() -> None:
    p, t = make_predictions("multiclass", 40, 4)
    keep = t != 2
    found = classification_metrics(p[keep], t[keep], "multiclass", ["a", "b", "c", "d"])
    present = [sk.roc_auc_score(t[keep] == c, p[keep, c]) for c in (0, 1, 3)]
    assert found["auc"] == pytest.approx(np.mean(present))
    assert math.isnan(found["auc/c"])
    assert "no sample of 'c'" in found.notes[0]
    assert found["balanced_accuracy"] == pytest.approx(np.mean([found[f"recall/{c}"] for c in "abd"]))


def test_every_undefined_metric_is_in_the_notes() -> None:
    found = classification_metrics(np.array([[0.9, 0.1]]), np.array([[0, 0]]), "multilabel")
    undefined = [name for name, value in found.items() if math.isnan(value)]
    assert "auc" in undefined
    assert found.notes[-1] == f"undefined here: {', '.join(undefined)}."


@pytest.mark.parametrize(
    ("p", "t", "kind", "words"),
    [
        (np.ones((3, 3)) / 3, np.zeros(3), "binary", "must be \\(n, 2\\)"),
        (np.ones(3), np.zeros(3), "binary", "must be \\(n, c\\)"),
        (np.zeros((0, 2)), np.zeros(0), "binary", "n, c > 0"),
        (np.ones((3, 2)) / 2, np.zeros(4), "binary", "targets must be \\(3,\\)"),
        (np.ones((3, 2)) / 2, np.zeros(3), "multilabel", "targets must be \\(3, 2\\)"),
        (np.array([[2.0, -1.0]]), np.zeros(1), "binary", "are these logits"),
        (np.array([[0.9, 0.9]]), np.zeros(1), "binary", "must sum to 1"),
        (np.array([[0.5, 0.5]]), np.array([2]), "binary", "from 0 to 1"),
        (np.array([[0.5, 0.5]]), np.array([0.5]), "binary", "whole numbers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(p: np.ndarray, t: np.ndarray, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        classification_metrics(p, t, kind)  # type: ignore[arg-type]


def test_class_names_must_be_as_many_as_columns() -> None:
    with pytest.raises(ValueError, match="1 class names for 2 columns"):
        classification_metrics(np.array([[0.5, 0.5]]), np.array([0]), "binary", ["a"])


def test_a_diverged_model_is_a_sentence() -> None:
    with pytest.raises(InputError, match=r"1 of 2 predictions hold NaN or infinity \(first: row 1\).*learning rate"):
        classification_metrics(np.array([[0.5, 0.5], [np.nan, 0.5]]), np.array([0, 1]), "binary")


def test_an_unknown_kind_is_a_sentence() -> None:
    with pytest.raises(InputError, match=r"kind of target .multilable. is not known\. Did you mean 'multilabel'"):
        classification_metrics(np.array([[0.5, 0.5]]), np.array([0]), "multilable")  # type: ignore[arg-type]


def test_concordance_by_hand() -> None:
    event, time = np.array([1, 1, 0, 0]), np.array([1.0, 2.0, 2.0, 3.0])
    # comparable: (0,1) (0,2) (0,3) (1,2: same time, censored) (1,3)
    assert concordance_index(event, time, np.array([4.0, 3.0, 2.0, 1.0])) == 1.0
    assert concordance_index(event, time, np.array([1.0, 2.0, 3.0, 4.0])) == 0.0
    assert concordance_index(event, time, np.array([1.0, 1.0, 0.0, 2.0])) == pytest.approx((0.5 + 1 + 0 + 1 + 0) / 5)


def test_concordance_without_a_comparable_pair_is_nan() -> None:
    assert math.isnan(concordance_index(np.zeros(3), np.arange(3), np.arange(3)))


def test_concordance_is_the_same_in_blocks() -> None:
    rng = np.random.default_rng(0)
    event, time, risk = rng.random(3000) < 0.9, rng.integers(50, size=3000), rng.integers(9, size=3000)
    hits = pairs = 0.0
    for i in np.flatnonzero(event):
        later = (time > time[i]) | ((time == time[i]) & ~event)
        pairs += later.sum()
        hits += (later & (risk[i] > risk)).sum() + 0.5 * (later & (risk[i] == risk)).sum()
    assert concordance_index(event, time, risk) == hits / pairs


def test_concordance_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="alike"):
        concordance_index(np.ones(2), np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="finite"):
        concordance_index(np.ones(2), np.array([1.0, np.nan]), np.ones(2))
