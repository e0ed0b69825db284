"""The intensity baseline finds what is bright under the skull, and is chosen without the test cases."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from tasks.common.crossval import Fold
from tasks.meningioma.demo import make_heads
from tasks.meningioma.demo.baseline import GRID, Settings, predict, threshold_baseline

Case = tuple[NDArray, NDArray, NDArray]


def phantom(seed: int, tumour: bool = True, level: float = 5.0) -> Case:
    """A ball of 80 mm radius with a bright rim and a bright ball in it; superior lies along the last axis."""
    rng = np.random.default_rng(seed)
    spacing = np.array([3.0, 4.0, 5.0])
    shape = (60, 46, 37)
    index = np.indices(shape).reshape(3, -1).T * spacing
    centre = np.array(shape) * spacing / 2
    radius = np.linalg.norm(index - centre, axis=1).reshape(shape)
    image = np.where(radius < 80, 1.0, 0.02) + np.where((radius > 74) & (radius < 80), 6.0, 0)
    reference = np.zeros(shape, bool)
    if tumour:
        at = centre + np.array([20.0, 10.0, 40.0]) + rng.uniform(-5, 5, 3)
        reference = (np.linalg.norm(index - at, axis=1) < 14).reshape(shape)
    image = image + level * reference + np.abs(rng.normal(0, 0.15, shape)) * (radius < 80)
    return image.astype(np.float32), reference.astype(np.uint8), np.diag([*spacing, 1.0])


def test_a_bright_ball_is_found_and_an_empty_head_is_left_alone() -> None:
    cases = {f"c{i}": phantom(i, tumour=i % 3 != 2) for i in range(6)}
    folds = [Fold(["c0", "c1", "c2"], [], ["c3", "c4", "c5"]), Fold(["c3", "c4", "c5"], [], ["c0", "c1", "c2"])]
    result = threshold_baseline(cases.__getitem__, folds)
    assert set(result["cases"]) == set(cases)
    assert np.isnan(result["cases"]["c2"]) and np.isnan(result["cases"]["c5"])
    assert result["dice"] > 0.9 and result["found"] == 1
    assert result["false_positives"] == 0
    assert result["dice"] == pytest.approx(np.nanmean(list(result["cases"].values())))


def test_the_prediction_is_what_was_scored() -> None:
    image, reference, affine = phantom(0)
    folds = [Fold(["a"], [], ["a"])]
    result = threshold_baseline(lambda _: (image, reference, affine), folds)
    settings = {k: v for k, v in result["settings"][0].items() if k != "fold"}
    found = predict(image, affine, Settings(**settings))
    dice = 2 * (found & (reference > 0)).sum() / (found.sum() + reference.sum())
    assert dice == pytest.approx(result["cases"]["a"])


def test_the_test_case_has_no_say_in_the_settings() -> None:
    train = {f"t{i}": phantom(i) for i in range(2)}
    plain, odd = phantom(9), phantom(9, level=-0.9)
    chosen = []
    for test in (plain, odd):
        cases = {**train, "x": test}
        chosen.append(threshold_baseline(cases.__getitem__, [Fold(["t0"], ["t1"], ["x"])])["settings"])
    assert chosen[0] == chosen[1]


def test_superior_may_be_any_axis() -> None:
    image, _, affine = phantom(1)
    settings = next(s for s in GRID if s.cut == 2.0 and s.core == 3)
    straight = predict(image, affine, settings)
    turned = predict(image.transpose(2, 0, 1)[::-1], _turn(affine, image.shape), settings)
    np.testing.assert_array_equal(turned[::-1].transpose(1, 2, 0), straight)
    assert straight.any()


def _turn(affine: NDArray, shape: tuple[int, ...]) -> NDArray:
    turned = np.eye(4)
    turned[:3, 0] = -affine[:3, 2]
    turned[:3, 1:3] = affine[:3, :2]
    turned[:3, 3] = affine[:3, 3] + affine[:3, 2] * (shape[2] - 1)
    return turned


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_an_image_without_contrast_has_no_tumour(value: float) -> None:
    image = np.full((9, 8, 7), value, np.float32)
    assert not predict(image, np.diag([3.0, 3, 3, 1]), GRID[0]).any()


def test_on_the_demo_heads_it_is_no_match_for_a_reader(tmp_path: Path) -> None:
    folder = make_heads(tmp_path / "set", 12, 7, 48).parent

    def load(case: str) -> Case:
        image = nibabel.load(folder / "imagesTr" / f"{case}_0000.nii.gz")
        mask = nibabel.load(folder / "labelsTr" / f"{case}.nii.gz")
        return image.get_fdata(dtype=np.float32), np.asanyarray(mask.dataobj), image.affine

    names = [f"head_{i + 1:03d}" for i in range(12)]
    folds = [Fold([n for n in names if n not in names[i::3]], [], names[i::3], i) for i in range(3)]
    result = threshold_baseline(load, folds)
    assert 0.02 < result["dice"] < 0.6
    assert 0.1 < result["found"] < 0.95
