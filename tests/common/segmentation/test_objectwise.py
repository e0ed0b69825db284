"""Components and their matching, against a direct search over all assignments."""

import itertools
import math
import time

import numpy as np
import pytest
from scipy.ndimage import label

from kernels.errors import InputError
from tasks.common.segmentation.objectwise import match_objects
from tests.common.segmentation.shapes import blobs, box


def test_diagonal_neighbours_are_two_objects_and_small_ones_do_not_count() -> None:
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])
    assert match_objects(mask, mask, min_voxels=1).reference_sizes.tolist() == [2, 3]
    assert match_objects(mask, mask, min_voxels=3).reference_sizes.tolist() == [3]
    assert match_objects(mask, mask, min_ml=0.25, voxel_ml=0.1).reference_sizes.tolist() == [3]
    with pytest.raises(InputError, match="volume of a voxel"):
        match_objects(mask, mask, min_ml=0.25)


def test_each_pair_has_its_overlap() -> None:
    reference = box((20, 6), (0, 4), (0, 4)) | box((20, 6), (8, 12), (0, 4)) | box((20, 6), (16, 20), (0, 4))
    predicted = box((20, 6), (0, 4), (0, 2)) | box((20, 6), (7, 12), (0, 5)) | box((20, 6), (14, 15), (0, 6))
    found = match_objects(predicted, reference, min_voxels=1)
    assert found.pairs.tolist() == [[0, 0], [1, 1]]
    assert found.found.tolist() == [True, True, False]
    assert found.dice == pytest.approx([16 / 24, 32 / 41])
    assert found.recall == pytest.approx([0.5, 1])
    assert found.precision == pytest.approx([1, 16 / 25])
    values = found.metrics()
    assert (values["recall"], values["precision"], values["f1"]) == (2 / 3, 2 / 3, 2 / 3)
    assert values["object_dice_sd"] == pytest.approx(np.std([16 / 24, 32 / 41]))


@pytest.mark.parametrize("shape", [(23, 31), (11, 12, 9)])
@pytest.mark.parametrize("seed", range(4))
def test_the_assignment_is_the_best_of_all(shape: tuple[int, ...], seed: int) -> None:
    p, r = blobs(shape, seed, 1.0, 0.25), blobs(shape, seed + 50, 1.0, 0.35)
    found = match_objects(p, r, min_voxels=2, least_dice=0)
    labels = [label(mask)[0] for mask in (r, p)]
    kept = [[x == k for k in range(1, x.max() + 1) if (x == k).sum() >= 2] for x in labels]
    table = np.array([[2 * (a & b).sum() / (a.sum() + b.sum()) for b in kept[1]] for a in kept[0]])
    assert found.dice == pytest.approx(table[tuple(found.pairs.T)])
    assert len(set(found.pairs[:, 0])) == len(set(found.pairs[:, 1])) == len(found.pairs)
    wide = table if table.shape[0] <= table.shape[1] else table.T
    if wide.shape[0] <= 4 and wide.shape[1] <= 8:
        orders = itertools.permutations(range(wide.shape[1]), wide.shape[0])
        best = max(sum(wide[k, column] for k, column in enumerate(order)) for order in orders)
    else:
        from scipy.optimize import linear_sum_assignment

        best = wide[linear_sum_assignment(wide, maximize=True)].sum()
    assert found.dice.sum() == pytest.approx(best)


def test_one_prediction_over_two_objects_belongs_to_the_one_it_covers_best() -> None:
    reference = box((4, 12), (0, 4), (0, 5)) | box((4, 12), (0, 4), (6, 8))
    found = match_objects(box((4, 12), (0, 4), (0, 8)), reference, min_voxels=1)
    assert found.pairs.tolist() == [[0, 0]]
    assert found.metrics()["recall"] == 0.5


@pytest.mark.parametrize("shape", [(5, 5), (0, 3), (3, 4, 5)])
def test_empty_masks_have_no_objects(shape: tuple[int, ...]) -> None:
    nothing, everything = np.zeros(shape), np.ones(shape)
    assert all(math.isnan(value) for value in match_objects(nothing, nothing).metrics().values())
    values = match_objects(nothing, everything, min_voxels=1).metrics()
    assert math.isnan(values["precision"])
    if everything.size:
        assert values["recall"] == 0


def test_many_objects_take_no_loop() -> None:
    speckle = np.random.default_rng(0).random((120, 120, 40)) < 0.08
    start = time.perf_counter()
    found = match_objects(np.roll(speckle, 1, axis=2), speckle, min_voxels=1)
    assert len(found.reference_sizes) > 15_000
    assert time.perf_counter() - start < 5


def test_nan_and_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        match_objects(np.full((2, 2), np.nan), np.ones((2, 2)))
    with pytest.raises(InputError, match="one shape"):
        match_objects(np.ones((2, 3)), np.ones((2, 2)))
