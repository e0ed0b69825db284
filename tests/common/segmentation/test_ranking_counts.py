"""Counts of pixels by level of probability rank them as the pixels themselves do."""

import numpy as np
import pytest

from kernels.errors import InputError
from tasks.common.segmentation.metrics_plots import pixel_curves
from tasks.common.segmentation.ranking import rank_pixels
from tasks.common.segmentation.ranking_counts import RankingCounts, count_ranking


def maps(seed: int, size: int = 120) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.random((size, size)) < 0.15
    logits = rng.normal(0, 3, (size, size)) + 4 * reference
    return (1 / (1 + np.exp(-logits))).astype(np.float32), reference, rng.random((size, size)) < 0.8


def test_the_areas_are_those_of_the_pixels() -> None:
    p, r, region = maps(0)
    exact, counted = rank_pixels(p, r, region), count_ranking(p, r, region)
    assert counted.auc == pytest.approx(exact.auc, abs=1e-4)
    assert counted.average_precision == pytest.approx(exact.average_precision, abs=1e-3)
    assert counted.prevalence == pytest.approx(exact.prevalence)
    assert counted.inside.sum() + counted.outside.sum() == region.sum()


def test_images_add_up_and_sets_are_done_at_once() -> None:
    (p, r, _), (q, s, _) = maps(1), maps(2, 90)
    one, two = count_ranking(p, r), count_ranking(q, s)
    exact = rank_pixels(np.concatenate([p.ravel(), q.ravel()]), np.concatenate([r.ravel(), s.ravel()]))
    assert (one + two).auc == pytest.approx(exact.auc, abs=1e-4)
    both = RankingCounts(np.stack([one.inside, two.inside]), np.stack([one.outside, two.outside]))
    assert both.aucs() == pytest.approx([one.auc, two.auc])


def test_certain_and_equal_probabilities_have_their_place() -> None:
    assert count_ranking([0.0, 1.0], [0, 1]).auc == 1
    assert count_ranking([0.5, 0.5, 0.5], [0, 1, 0]).auc == 0.5
    assert np.isnan(count_ranking([0.5], [0]).auc) and np.isnan(count_ranking([0.5], [0]).average_precision)
    assert np.isnan(count_ranking(np.zeros(0), np.zeros(0)).auc)


def test_the_curve_ends_where_everything_is_found() -> None:
    p, r, _ = maps(3)
    ranking = count_ranking(p, r)
    fpr, recall, precision = ranking.curve()
    assert fpr[-1] == recall[-1] == 1 and precision[-1] == pytest.approx(r.mean())
    assert len(pixel_curves({"network": ranking}).axes) == 2
    with pytest.raises(InputError, match="only one kind"):
        count_ranking(p, np.zeros_like(r)).curve()


@pytest.mark.parametrize(
    ("p", "said"), [([0.1, np.nan], "NaN or outside"), ([0.1, 2.0], "NaN or outside"), ([0.1], "one shape")]
)
def test_what_is_no_probability_is_refused(p: list[float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        count_ranking(p, [0, 1])
