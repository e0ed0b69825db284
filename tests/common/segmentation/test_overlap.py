"""Counts and ratios against their formulas; every rule for empty masks; regions; bad masks in one sentence."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from kernels.errors import InputError
from tasks.common.segmentation.overlap import (
    confusion_matrices,
    mean_absolute_error,
    overlap_metrics,
    voxel_volume_ml,
)
from tests.common.segmentation.shapes import blobs, box

RATIOS = ("dice", "iou", "sensitivity", "specificity", "precision", "accuracy", "mae")


@pytest.mark.parametrize("shape", [(7, 5), (3, 6, 5), (11,)])
@pytest.mark.parametrize("classes", [2, 4])
def test_counts_are_those_of_scikit_learn(shape: tuple[int, ...], classes: int) -> None:
    rng = np.random.default_rng(0)
    p, r = rng.integers(0, classes, (2, 3, *shape))
    counted = confusion_matrices(p, r, classes)
    for k in range(3):
        assert (counted[k] == confusion_matrix(r[k].ravel(), p[k].ravel(), labels=range(classes))).all()
    found = overlap_metrics(p, r, empty="nan", num_classes=classes)
    assert found["dice"].shape == (3, classes - 1)
    for c in range(1, classes):
        assert found["iou"][1, c - 1] == pytest.approx(jaccard_score(r[1].ravel() == c, p[1].ravel() == c))


def test_tensors_and_arrays_of_any_type_and_order_agree() -> None:
    p, r = blobs((6, 7, 5), 1), blobs((6, 7, 5), 2)
    expected = overlap_metrics(p[None], r[None], empty="nan")
    assert expected["mae"] == pytest.approx(1 - expected["accuracy"])
    read_only = np.asfortranarray(p)[None].astype(">u2")
    read_only.setflags(write=False)
    for kind in (read_only, p[None].astype(float), torch.from_numpy(p)[None], p[None, ::-1][:, ::-1]):
        found = overlap_metrics(kind, r[None], empty="nan")
        assert all((found[name] == expected[name]).all() for name in expected)


def test_blocks_give_the_counts_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    p, r = blobs((4, 9, 7), 1), blobs((4, 9, 7), 2)
    whole = confusion_matrices(p, r, region=blobs((9, 7), 3))
    monkeypatch.setattr("tasks.common.segmentation.overlap._BLOCK", 40)
    assert (confusion_matrices(p, r, region=blobs((9, 7), 3)) == whole).all()


def test_only_the_region_counts() -> None:
    p, r, field = blobs((2, 8, 9), 1), blobs((2, 8, 9), 2), blobs((2, 8, 9), 3, share=0.6)
    found = overlap_metrics(p, r, empty="nan", region=field)
    changed = overlap_metrics(p | ~field, r & field, empty="nan", region=field)
    assert all((found[name] == changed[name]).all() for name in RATIOS)
    tp = (p & r & field)[0].sum()
    assert found["dice"][0, 0] == 2 * tp / ((p & field)[0].sum() + (r & field)[0].sum())
    ignored = np.where(field, r, -1)
    assert (overlap_metrics(p, ignored, empty="nan")["iou"] == found["iou"]).all()


NAN = float("nan")


@pytest.mark.parametrize(
    ("rule", "both", "no_reference", "no_prediction"),
    [
        ("one", 1, (0, 0, 0, 0), (0, 0, 0, 0)),
        ("zero", 0, (0, 0, 0, 0), (0, 0, 0, 0)),
        ("raidionics", 0, (0, 0, 0, 0), (0, 0, 0, 0)),
        ("nan", NAN, (0, 0, NAN, 0), (0, 0, 0, NAN)),
        ("qtseg", 1, (2 / 6, 1 / 5, 1, 1 / 5), (2 / 6, 1 / 5, 1 / 5, 1)),
    ],
)
def test_empty_masks_follow_the_named_rule(rule: str, both: float, no_reference: tuple, no_prediction: tuple) -> None:
    four, nothing = box((5, 5), (1, 3), (1, 3)), np.zeros((5, 5), dtype=bool)
    found = overlap_metrics(np.stack([nothing, four, nothing]), np.stack([nothing, nothing, four]), empty=rule)  # type: ignore[arg-type]
    for name, a, b in zip(("dice", "iou", "sensitivity", "precision"), no_reference, no_prediction, strict=True):
        assert found[name][:, 0] == pytest.approx([both, a, b], nan_ok=True), name
    assert found["mae"][:, 0] == pytest.approx([0, 4 / 25, 4 / 25])


def test_a_full_reference_has_no_specificity_and_an_empty_region_has_nothing() -> None:
    full = np.ones((1, 3, 3), dtype=int)
    found = overlap_metrics(full, full, empty="one")
    assert (found["dice"], found["sensitivity"]) == (1, 1)
    assert np.isnan(found["specificity"])
    nowhere = overlap_metrics(full, full, empty="one", region=np.zeros((3, 3)))
    assert np.isnan(nowhere["accuracy"])
    assert nowhere["dice"] == 1


def test_no_cases_give_no_rows() -> None:
    found = overlap_metrics(np.zeros((0, 4, 4), int), np.zeros((0, 4, 4), int), empty="nan", voxel_ml=0.1)
    assert all(values.shape == (0, 1) for values in found.values())


def test_volumes_are_voxels_times_their_size() -> None:
    p, r = box((2, 9, 9, 9), (0, 2), (1, 3), (1, 4), (1, 5)), box((2, 9, 9, 9), (0, 1), (1, 2), (1, 2), (1, 2))
    found = overlap_metrics(p, r, empty="nan", voxel_ml=[0.5, 2.0])
    assert found["predicted_ml"][:, 0].tolist() == [12, 48]
    assert found["reference_ml"][:, 0].tolist() == [0.5, 0]
    turned = np.array([[0, -2.0, 0.5, 9], [1.5, 0, 0, 3], [0, 0, 3.0, 1], [0, 0, 0, 1]])  # a shear leaves the volume
    assert voxel_volume_ml(turned) == pytest.approx(0.009)
    with pytest.raises(InputError, match="without volume"):
        voxel_volume_ml(np.zeros((4, 4)))


def test_the_error_of_probabilities_is_their_mean_distance() -> None:
    p = np.array([[0.2, 0.9], [0.5, 0.5]])
    assert mean_absolute_error(p, np.array([[0, 1], [1, 0]])) == pytest.approx([0.15, 0.5])
    assert mean_absolute_error(p, np.array([[0, 1], [1, 0]]), np.array([True, False])) == pytest.approx([0.2, 0.5])
    with pytest.raises(InputError, match="NaN"):
        mean_absolute_error(np.array([[np.nan]]), np.array([[1]]))


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        (np.full((1, 2, 2), np.nan), "cut probabilities"),
        (np.full((1, 2, 2), 0.5), "cut probabilities"),
        (np.full((1, 2, 2), 3), "classes 3 to 3"),
        (np.full((1, 2, 2), -1), "classes -1 to -1"),
        (np.zeros((1, 2, 3), int), "grid of the reference"),
    ],
)
def test_a_bad_mask_is_one_sentence(predicted: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        overlap_metrics(predicted, np.zeros((1, 2, 2), int), empty="nan")


def test_an_unknown_rule_and_a_region_of_another_shape_are_named() -> None:
    mask = np.zeros((1, 2, 2), int)
    with pytest.raises(InputError, match=r"'raidionic'.*Did you mean 'raidionics'"):
        overlap_metrics(mask, mask, empty="raidionic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="region"):
        overlap_metrics(mask, mask, empty="nan", region=np.ones((3, 2)))
