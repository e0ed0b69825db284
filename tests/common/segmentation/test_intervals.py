"""Resampled statistics equal those of the resampled rows; the summary holds what a report shows."""

import json

import numpy as np
import pandas as pd
import pytest

from kernels.errors import InputError
from tasks.common.bootstrap import resample_weights
from tasks.common.segmentation.intervals import (
    Found,
    case_statistics,
    compare_cases,
    mean_intervals,
    ratio_intervals,
)
from tasks.common.segmentation.patientwise import patientwise_metrics
from tasks.common.segmentation.summary import metrics_table, summarise_cases, volume_table
from tests.common.segmentation.cases import make_cases

METRICS = ["dice", "hd95"]


@pytest.mark.parametrize("found", [Found(), Found("tp", 3.0, 0.5), Found("positive", 3.0), Found("all")])
def test_each_resample_equals_the_metrics_of_its_rows(found: Found) -> None:
    table = make_cases(14)
    weights = np.concatenate(list(resample_weights(np.zeros(14, int), list(table["patient"]), 40, seed=1)))
    fast = case_statistics(table, METRICS, found)(weights)
    for s, copies in enumerate(weights.astype(int)):
        rows = table.iloc[np.repeat(np.arange(14), copies)]
        columns = [rows[name] for name in ("dice", "reference_ml", "predicted_ml")]
        slow = patientwise_metrics(*columns, found.convention, found.volume_limit_ml, found.overlap)
        assert fast["hd95"][s] == pytest.approx(rows["hd95"].mean(), nan_ok=True)
        for name in ("dice", "dice_tp"):
            assert fast[name][s] == pytest.approx(slow[name], nan_ok=True)
        for name in ("recall", "precision", "f1", "specificity", "accuracy", "balanced_accuracy"):
            assert fast[f"patient_{name}"][s] == pytest.approx(slow[name], nan_ok=True)


def test_the_interval_of_a_mean_is_about_two_standard_errors() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    ends = mean_intervals({"x": np.r_[values, np.nan]}, num_samples=4000)["x"]
    error = values.std(ddof=1) / 20
    assert (ends.low, ends.high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error
    )


def test_scans_of_a_patient_count_once() -> None:
    values = np.repeat(np.random.default_rng(0).normal(size=40), 5)
    alone = mean_intervals({"x": values})["x"]
    together = mean_intervals({"x": values}, groups=np.repeat(np.arange(40), 5).tolist())["x"]
    assert together.high - together.low > 1.9 * (alone.high - alone.low)


def test_a_pooled_ratio_resamples_both_counts() -> None:
    found, objects = np.array([3, 0, 1, 2]), np.array([4, 0, 1, 5])
    ends = ratio_intervals({"recall": (found, objects)}, num_samples=500, seed=2)["recall"]
    weights = np.concatenate(list(resample_weights(np.zeros(4, int), None, 500, 2)))
    with np.errstate(invalid="ignore"):
        resampled = (weights @ found) / (weights @ objects)
    known = resampled[np.isfinite(resampled)]
    assert (ends.low, ends.high) == pytest.approx(tuple(np.quantile(known, [0.025, 0.975])))
    assert ends.undefined == 500 - len(known)


def test_a_run_against_itself_differs_by_nothing_and_a_better_one_is_seen() -> None:
    table = make_cases(40)
    same = compare_cases(table, table.sample(frac=1, random_state=0), METRICS, Found(), num_samples=200)
    assert all((d.value, d.low, d.high) == (0, 0, 0) for name, d in same.items() if name in METRICS)
    better = table.assign(dice=np.minimum(table["dice"] + 0.05, 1))
    found = compare_cases(better, table, ["dice"], num_samples=200)["dice"]
    assert found.low > 0
    assert found.p_value < 0.05
    with pytest.raises(InputError, match="'c039'"):
        compare_cases(table, table.iloc[:-1], METRICS)
    with pytest.raises(InputError, match="a case twice"):
        compare_cases(table, pd.concat([table, table.iloc[:1]]), METRICS)


def test_the_summary_has_values_intervals_volumes_and_folds() -> None:
    table = make_cases(60)
    summary = summarise_cases(table, num_samples=200)
    assert (summary["cases"], summary["patients"]) == (60, 30)
    assert list(summary["pooled"])[:4] == ["dice", "dice/oedema", "dice_tp", "patient_recall"]
    assert "seconds" not in summary["pooled"]
    for name, row in summary["pooled"].items():
        assert row["low"] <= row["value"] <= row["high"], name
    assert summary["pooled"]["dice"]["value"] == pytest.approx(table["dice"].mean())
    small, large = summary["by_volume"].values()
    assert small["cases"] + large["cases"] == 58
    assert large["pooled"]["patient_recall"]["value"] > small["pooled"]["patient_recall"]["value"]
    big = table[table["reference_ml"] >= 3]
    assert large["pooled"]["dice"]["value"] == pytest.approx(big["dice"].mean())
    assert "patient_precision" not in large["pooled"]
    by_fold = table.groupby("fold")["dice"]
    assert [fold["dice"] for fold in summary["per_fold"]] == pytest.approx(by_fold.mean().tolist())
    assert summary["folds"]["dice"] == pytest.approx(
        {"mean": by_fold.mean().mean(), "sd": by_fold.mean().std(), "n": 3}
    )
    assert any("undefined in 1 of 60" in note for note in summary["notes"])
    assert any("1809.04430" in text for text in summary["definitions"])
    assert json.loads(json.dumps(summary))["cases"] == 60


def test_the_summary_becomes_two_tables() -> None:
    summary = summarise_cases(make_cases(60), num_samples=50)
    rows = metrics_table(summary)
    assert rows["Metric"].tolist()[:3] == ["Dice", "Dice, oedema", "Dice-TP (of those found)"]
    assert "Surface Dice at 2 mm" in rows["Metric"].tolist()
    assert {"95 % interval", "Mean ± SD over folds", "n"} <= set(rows.columns)
    volumes = volume_table(summary)
    assert volumes["Volume"].tolist() == ["< 3 ml", ">= 3 ml"]
    assert all("–" in text for text in volumes["Recall (patient-wise)"])


def test_images_without_volumes_have_means_only() -> None:
    table = make_cases(9).drop(columns=["reference_ml", "predicted_ml", "fold", "patient"])
    summary = summarise_cases(table, num_samples=20)
    assert "by_volume" not in summary
    assert "folds" not in summary
    assert volume_table(summary).empty
    assert list(summary["pooled"]) == ["dice", "dice/oedema", "nsd_2mm", "hd95"]


def test_one_case_one_fold_and_an_empty_class_still_make_a_summary() -> None:
    table = make_cases(60).iloc[2:3].assign(reference_ml=9.0, predicted_ml=8.0, dice=0.9)
    summary = summarise_cases(table, num_samples=10)
    assert summary["by_volume"]["< 3 ml"] == {"cases": 0, "pooled": {}}
    assert summary["pooled"]["patient_recall"]["value"] == 1
    assert any("no proof of certainty" in note for note in summary["notes"])
    assert len(volume_table(summary)) == 2
    assert len(metrics_table(summary))


def test_repeats_are_folds_of_their_own() -> None:
    table = pd.concat([make_cases(12).assign(repeat=k) for k in range(2)], ignore_index=True)
    summary = summarise_cases(table, ["dice"], num_samples=10)
    assert [(f["repeat"], f["fold"]) for f in summary["per_fold"]] == [(r, f) for r in (0, 1) for f in (0, 1, 2)]
    assert summary["patients"] == 6


def test_a_summary_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to summarise"):
        summarise_cases(make_cases(4).iloc[:0])
    with pytest.raises(InputError, match="no column 'hd99'"):
        summarise_cases(make_cases(4), ["hd99"])
    with pytest.raises(InputError, match="no column 'dice'"):
        summarise_cases(make_cases(4)[["case_id"]])
    with pytest.raises(ValueError, match="num_samples=0"):
        summarise_cases(make_cases(4), num_samples=0)
