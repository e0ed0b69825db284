"""Detection by each convention, patient by patient; volume classes; pooling over folds."""

import math

import numpy as np
import pytest

from kernels.errors import InputError
from tasks.common.segmentation.patientwise import by_volume, detections, patientwise_metrics, pool_folds

#        found  small  wrong place  missed  false alarm  small alarm  healthy
DICE = [0.8, 0.7, 0.0, 0.0, 0.0, 0.0, math.nan]
REFERENCE = [9.0, 2.0, 7.0, 5.0, 0.0, 0.0, 0.0]
PREDICTED = [8.0, 2.5, 6.0, 0.0, 4.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("convention", "limit", "outcome"),
    [
        ("all", 3.0, "TTTMFF-"),
        ("positive", 3.0, "T-TMF--"),
        ("tp", 3.0, "T-MMF--"),
        ("tp", 0.0, "TTMMFF-"),
        ("tp", 2.2, "TFMMF--"),  # the second is below the limit and predicted above it
    ],
)
def test_each_patient_is_what_the_convention_says(convention: str, limit: float, outcome: str) -> None:
    found = detections(DICE, REFERENCE, PREDICTED, convention, limit)  # type: ignore[arg-type]
    letters = np.full(7, "?")
    for flags, letter in ((found.tp, "T"), (found.fp, "F"), (found.fn, "M"), (found.tn, "-")):
        assert (letters[flags] == "?").all()
        letters[flags] = letter
    assert "".join(letters) == outcome


def test_a_dice_at_the_overlap_is_not_above_it() -> None:
    assert detections([0.5, 0.51], [9, 9], [9, 9], "tp", 3, overlap=0.5).tp.tolist() == [False, True]


def test_rates_follow_from_the_four_counts() -> None:
    found = patientwise_metrics(DICE, REFERENCE, PREDICTED, "tp", 0.0)  # 2 found, 2 missed, 2 false, 1 healthy
    assert found["recall"] == found["precision"] == found["f1"] == 0.5
    assert found["specificity"] == pytest.approx(1 / 3)
    assert found["accuracy"] == pytest.approx(3 / 7)
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found["dice"] == pytest.approx(1.5 / 6)  # nothing to find and nothing found has no Dice
    assert found["dice_tp"] == 0.75
    assert patientwise_metrics(DICE, REFERENCE, PREDICTED, "tp", 3.0)["dice_tp"] == 0.8


def test_nothing_by_nothing_is_nan_or_by_the_released_form_zero() -> None:
    healthy = ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
    assert math.isnan(patientwise_metrics(*healthy)["recall"])
    assert patientwise_metrics(*healthy, smoothing=1e-6)["recall"] == 0
    empty = patientwise_metrics([], [], [])
    assert all(math.isnan(value) for value in empty.values())


def test_bad_columns_are_one_sentence() -> None:
    with pytest.raises(InputError, match="1 patients have a volume but no Dice"):
        patientwise_metrics([math.nan], [2.0], [0.0])
    with pytest.raises(InputError, match="negative, NaN"):
        patientwise_metrics([0.5], [-2.0], [0.0])
    with pytest.raises(InputError, match="for each patient"):
        patientwise_metrics([0.5, 0.5], [2.0], [0.0])
    with pytest.raises(InputError, match=r"'TP'.*Did you mean 'tp'"):
        patientwise_metrics([0.5], [2.0], [1.0], "TP")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="volume limit -1"):
        patientwise_metrics([0.5], [2.0], [1.0], volume_limit_ml=-1)


def test_the_limit_itself_is_in_the_upper_class() -> None:
    classes = by_volume([0.0, 0.001, 4.0, 3.999], 4)
    assert [flags.tolist() for flags in classes.values()] == [[0, 1, 0, 1], [0, 0, 1, 0]]


def test_pooling_folds_gives_back_the_mean_and_the_deviation_within() -> None:
    rng = np.random.default_rng(0)
    folds = [rng.random((n, 3)) for n in (4, 7, 2)]
    mean, sd = pool_folds([f.mean(0) for f in folds], [f.std(0, ddof=1) for f in folds], [len(f) for f in folds])
    assert mean == pytest.approx(np.concatenate(folds).mean(0))
    centred = np.concatenate([f - f.mean(0) for f in folds])
    assert sd == pytest.approx(np.sqrt((centred**2).sum(0) / (len(centred) - 3)))


def test_a_fold_of_one_case_and_a_fold_without_value_still_pool() -> None:
    mean, sd = pool_folds([0.5, 0.9, math.nan], [0.1, math.nan, math.nan], [3, 1, 8])
    assert mean == pytest.approx(0.6)
    assert sd == pytest.approx(0.1)
