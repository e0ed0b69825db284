"""Areas under pixel curves equal scikit-learn's; centre lines keep the topology; clDice by hand."""

import math

import numpy as np
import pytest
from skimage.measure import euler_number, label
from skimage.morphology import skeletonize
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from kernels.errors import InputError
from tasks.common.segmentation.ranking import centreline_dice, rank_pixels
from tasks.common.segmentation.thinning import skeleton
from tests.common.segmentation.shapes import blobs, box


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.uint8])
def test_the_areas_are_those_of_scikit_learn(kind: type) -> None:
    rng = np.random.default_rng(0)
    truth, region = blobs((31, 17), 1), blobs((31, 17), 2, share=0.6)
    scores = np.clip(rng.normal(0.4 + 0.2 * truth, 0.2), 0, 1)
    scores = (255 * scores).astype(kind) if kind is np.uint8 else np.round(scores, 2).astype(kind)  # many ties
    for inside in (np.ones_like(region), region):
        found = rank_pixels(scores, truth, inside)
        y, s = truth[inside], scores[inside].astype(np.float64)
        assert found.auc == pytest.approx(roc_auc_score(y, s), abs=1e-12)
        assert found.average_precision == pytest.approx(average_precision_score(y, s), abs=1e-12)


def test_the_curve_is_exact_and_as_short_as_asked() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(5000) < 0.1
    scores = np.clip(rng.normal(0.4 + 0.2 * truth, 0.2), 0, 1)
    fpr, recall, precision = rank_pixels(scores, truth).curve(100)
    assert len(fpr) <= 104
    assert (fpr[-1], recall[-1]) == (1, 1)
    assert points(fpr, recall) <= points(*roc_curve(truth, scores, drop_intermediate=False)[:2])
    assert points(precision, recall) <= points(*precision_recall_curve(truth, scores)[:2])


def points(x: np.ndarray, y: np.ndarray) -> set[tuple[float, float]]:
    return {(round(a, 9), round(b, 9)) for a, b in zip(x.tolist(), y.tolist(), strict=True)}


def test_large_maps_lose_no_precision() -> None:
    truth = np.arange(300_000) >= 100_000
    assert rank_pixels(np.arange(300_000), truth).auc == 1
    assert rank_pixels(-np.arange(300_000), truth).auc == 0
    assert rank_pixels(np.zeros(300_000), truth).auc == 0.5
    assert rank_pixels(np.zeros(300_000), truth).average_precision == pytest.approx(2 / 3)


def test_one_kind_of_pixels_has_no_ranking() -> None:
    found = rank_pixels(np.zeros((2, 2)), np.zeros((2, 2)))
    assert math.isnan(found.auc)
    assert math.isnan(found.average_precision)
    with pytest.raises(InputError, match="only one kind"):
        found.curve()
    with pytest.raises(InputError, match="NaN"):
        rank_pixels([math.nan], [1])
    with pytest.raises(InputError, match="one shape"):
        rank_pixels([0.5], [1, 0])


@pytest.mark.parametrize("shape", [(40, 33), (1, 9), (2, 2), (5, 1), (17, 14, 19), (1, 12, 9), (6, 1, 1), (9, 9, 2)])
@pytest.mark.parametrize("sigma", [0.6, 1.6])
def test_centre_lines_keep_components_holes_and_cavities(shape: tuple[int, ...], sigma: float) -> None:
    dims = len(shape)
    for seed in range(3):
        mask = blobs(shape, seed, sigma, 0.4)
        thin = skeleton(mask)
        assert not (thin & ~mask).any()
        framed, lines = np.pad(mask, 1), np.pad(thin, 1)
        assert euler_number(lines, connectivity=dims) == euler_number(framed, connectivity=dims)
        assert label(lines, connectivity=dims).max() == label(framed, connectivity=dims).max()
        assert label(~lines, connectivity=1).max() == label(~framed, connectivity=1).max()
        assert (skeleton(thin) == thin).all()


def test_no_square_of_a_centre_line_is_full() -> None:
    thin = skeleton(blobs((60, 70), 1, 2.0, 0.5))
    assert not (thin[1:, 1:] & thin[1:, :-1] & thin[:-1, 1:] & thin[:-1, :-1]).any()
    assert np.abs(thin.sum() / skeletonize(blobs((60, 70), 1, 2.0, 0.5)).sum() - 1) < 0.15


def test_a_thick_rod_becomes_its_axis_and_a_ring_stays_one() -> None:
    rod = skeleton(box((30, 9, 9), (2, 28), (2, 7), (2, 7)))
    assert 18 <= rod.sum() <= 30
    assert (np.argwhere(rod)[:, 1:] == 4).all()
    axes = np.ogrid[:31, :31, :11]
    ring = (np.hypot(axes[0] - 15, axes[1] - 15) - 10) ** 2 + (axes[2] - 5) ** 2 <= 9
    thin = skeleton(ring)
    assert thin.sum() < ring.sum() / 15
    assert euler_number(thin, connectivity=3) == 0


def test_clipped_ends_cost_sensitivity_and_branches_cost_precision() -> None:
    reference = box((11, 40), (4, 7), (1, 39))
    shorter = box((11, 40), (4, 7), (1, 20))
    found = centreline_dice(shorter, reference)
    assert found["topology_precision"] == 1
    assert found["topology_sensitivity"] == 19 / 38  # the axis is as long as the bar
    branched = centreline_dice(reference | box((11, 40), (0, 5), (19, 22)), reference)
    assert branched["topology_precision"] < 1 == branched["topology_sensitivity"]
    a, b = branched["topology_precision"], branched["topology_sensitivity"]
    assert branched["cldice"] == 2 * a * b / (a + b)
    thick = box((11, 40), (3, 8), (0, 40))
    assert centreline_dice(thick, reference)["topology_sensitivity"] == 1
    inside = np.zeros((11, 40))
    inside[:, :20] = 1
    assert centreline_dice(shorter, reference, inside)["topology_sensitivity"] == 1


def test_empty_masks_follow_the_stated_rule() -> None:
    nothing, some = np.zeros((4, 5, 6)), np.ones((4, 5, 6))
    assert all(math.isnan(value) for value in centreline_dice(nothing, nothing).values())
    assert centreline_dice(some, nothing)["cldice"] == centreline_dice(nothing, some)["cldice"] == 0
    assert math.isnan(centreline_dice(nothing, some)["topology_precision"])
    far = centreline_dice(box((9, 9), (0, 2), (0, 9)), box((9, 9), (7, 9), (0, 9)))
    assert far["cldice"] == 0
    with pytest.raises(InputError, match="one shape"):
        centreline_dice(nothing, nothing[0])
    with pytest.raises(InputError, match="without NaN"):
        skeleton(np.full((3, 3), np.nan))
    with pytest.raises(InputError, match=r"\(H, W\) or"):
        skeleton(np.ones(3))
