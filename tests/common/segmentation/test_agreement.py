"""Bland and Altman's own example; concordance and its interval; growth with its resampling error."""

import datetime
import math

import numpy as np
import pytest

from kernels.errors import InputError
from tasks.common.segmentation.agreement import bland_altman, lin_concordance
from tasks.common.segmentation.growth import growth, resampled_volumes
from tests.common.segmentation.shapes import ball, box

# Peak expiratory flow by two meters, Bland and Altman, Lancet 1986, table 1 (first measurements).
WRIGHT = [494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427]
MINI = [512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451]


def test_the_published_example_comes_out() -> None:
    found = bland_altman(WRIGHT, MINI)
    assert found.bias == pytest.approx(-2.1, abs=0.05)
    assert found.sd == pytest.approx(38.8, abs=0.05)
    assert (found.bias_interval.low, found.bias_interval.high) == pytest.approx((-22.0, 17.8), abs=0.15)
    # The example takes sqrt(3/n) SD as the error of a limit and 2 SD; ours are the later, more exact ones.
    assert (found.lower, found.upper) == pytest.approx((-78.1, 73.9), abs=0.1)
    assert found.lower_interval.low == pytest.approx(found.lower - 34.8, abs=0.5)
    assert found.upper_interval.high == pytest.approx(found.upper + 34.8, abs=0.5)
    swapped = bland_altman(MINI, WRIGHT)
    assert (swapped.bias, swapped.lower) == pytest.approx((-found.bias, -found.upper))


def test_percentages_are_of_the_mean_and_leave_empty_pairs_out() -> None:
    found = bland_altman([11.0, 0.0, 30.0], [9.0, 0.0, 30.0], "percent")
    assert (found.bias, found.n, found.left_out) == (10.0, 2, 1)


@pytest.mark.parametrize(("predicted", "reference"), [([1.0], [1.0]), ([1.0, math.nan], [1, 2]), ([1.0, -1], [1, 2])])
def test_too_few_or_bad_volumes_are_refused(predicted: list, reference: list) -> None:
    with pytest.raises(InputError):
        bland_altman(predicted, reference)


def test_the_intervals_of_bias_and_limits_cover() -> None:
    rng = np.random.default_rng(0)
    hits = np.zeros(2)
    for _ in range(400):
        reference = rng.uniform(10, 50, 40)
        found = bland_altman(reference + rng.normal(1, 2, 40), reference)
        hits += [
            found.bias_interval.low <= 1 <= found.bias_interval.high,
            found.upper_interval.low <= 1 + 1.96 * 2 <= found.upper_interval.high,
        ]
    assert (np.abs(hits / 400 - 0.95) < 0.03).all()


def test_concordance_is_one_on_identity_and_falls_with_bias_and_scale() -> None:
    x = np.random.default_rng(0).uniform(1, 9, 30)
    assert lin_concordance(x, x)[0] == pytest.approx(1)
    shifted, scaled = lin_concordance(x + 2, x)[0], lin_concordance(2 * x, x)[0]
    assert shifted == pytest.approx(x.var() / (x.var() + 2))
    assert scaled == pytest.approx(4 * x.var() / (5 * x.var() + x.mean() ** 2))
    assert math.isnan(lin_concordance([1, 1, 1], [1, 1, 1])[0])
    assert math.isnan(lin_concordance([1, 2], [1, 2])[0])


def test_the_interval_of_the_concordance_covers() -> None:
    rng = np.random.default_rng(2)
    truth = 2 * 4 / (4 + 5 + 1)  # covariance 4, variances 4 and 5, bias 1
    hits = 0
    for _ in range(300):
        x = rng.normal(50, 2, 80)
        _, ends = lin_concordance(x + rng.normal(1, 1, 80), x)
        hits += ends.low <= truth <= ends.high
    assert abs(hits / 300 - 0.95) < 0.035


def test_growth_is_per_year_and_doubling_time_of_exponential_growth() -> None:
    first, second = box((20, 20, 20), (5, 15), (5, 15), (5, 10)), box((20, 20, 20), (5, 15), (5, 15), (5, 15))
    found = growth(first, np.eye(4), "2023-01-01", second, np.eye(4), datetime.date(2024, 1, 1))
    assert (found.first_ml, found.second_ml, found.ml, found.percent) == (0.5, 1.0, 0.5, 100.0)
    assert found.days == 365
    assert found.ml_per_year == pytest.approx(0.5 * 365.25 / 365)
    assert found.doubling_days == pytest.approx(365)
    for value, ends in (
        (found.first_ml, found.first_interval),
        (found.ml, found.ml_interval),
        (found.percent, found.percent_interval),
        (found.ml_per_year, found.ml_per_year_interval),
        (found.doubling_days, found.doubling_interval),
    ):
        assert ends.low <= value <= ends.high
        assert ends.high - ends.low < 0.4 * value


def test_no_change_is_within_the_resampling_error_and_never_doubles() -> None:
    first = ball((30, 30, 30), (14.0, 14.2, 13.7), 8)
    second = ball((30, 30, 30), (14.4, 13.7, 14.1), 8)  # the same ball elsewhere on the grid
    found = growth(first, np.eye(4), "2023-01-01", second, np.eye(4), "2023-07-01")
    assert found.ml_interval.low <= 0 <= found.ml_interval.high
    assert found.doubling_interval.high == math.inf
    shrunk = growth(first, np.eye(4), "2023-01-01", ball((30, 30, 30), (14, 14, 14), 4), np.eye(4), "2023-07-01")
    assert math.isnan(shrunk.doubling_days)
    assert shrunk.percent == pytest.approx(-87, abs=2)


def test_coarse_voxels_make_a_wider_interval() -> None:
    coarse = resampled_volumes(ball((30, 30, 30), (14, 14, 14), 8), np.eye(4), spacing=4.0)
    fine = resampled_volumes(ball((30, 30, 30), (14, 14, 14), 8), np.eye(4), spacing=(0.9, 1.0, 1.1))
    exact = 4 / 3 * math.pi * 8**3 / 1000
    assert fine.std() < 0.02 * exact < 0.05 * exact < coarse.std()
    assert fine.mean() == pytest.approx(exact, rel=0.03)
    assert coarse.mean() == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("edge", [(0, 3), (7, 10)])
def test_a_structure_at_the_border_of_the_scan_loses_nothing(edge: tuple[int, int]) -> None:
    inner = resampled_volumes(box((30, 10, 10), (12, 15), (3, 7), (3, 7)), np.eye(4), spacing=0.5)
    border = resampled_volumes(box((10, 10, 10), edge, (3, 7), (3, 7)), np.eye(4), spacing=0.5)
    assert border == pytest.approx(inner)


def test_empty_masks_and_a_turned_affine_have_their_volume() -> None:
    assert resampled_volumes(np.zeros((3, 3, 3)), np.eye(4)).tolist() == [0] * 64
    turned = np.array([[0, -2.0, 0, 0], [3, 0, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 1]])
    assert resampled_volumes(box((40, 40, 40), (5, 35), (5, 35), (5, 35)), turned).mean() == pytest.approx(81, rel=0.01)
    gone = growth(np.zeros((3, 3, 3)), np.eye(4), "2023-01-01", np.ones((3, 3, 3)), np.eye(4), "2023-02-01")
    assert gone.ml == 0.027
    assert math.isnan(gone.percent)


@pytest.mark.parametrize(
    ("dates", "message"), [(("2024-01-01", "2024-01-01"), "later"), (("1.2.24", "2024-05-01"), "YYYY")]
)
def test_bad_dates_are_one_sentence(dates: tuple[str, str], message: str) -> None:
    mask = np.ones((2, 2, 2))
    with pytest.raises(InputError, match=message):
        growth(mask, np.eye(4), dates[0], mask, np.eye(4), dates[1])
    with pytest.raises(InputError, match="X, Y, Z"):
        growth(mask[0], np.eye(4), "2023-01-01", mask, np.eye(4), "2024-01-01")
