"""One pass over a map gives what ten thresholds give, and the search finds the best of them."""

import numpy as np
import pytest

from kernels.errors import InputError
from tasks.common.segmentation.cutoff import CUTOFFS, BestCutoff, best_cutoff, cutoff_counts
from tests.common.segmentation.shapes import blobs


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_the_counts_are_those_of_each_threshold(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    p = np.round(rng.random((7, 9, 5)), 1).astype(kind)  # many exactly at a cut-off
    reference, region = blobs(p.shape, 1), blobs(p.shape, 2, share=0.7)
    for inside in (None, region):
        monkeypatch.setattr("tasks.common.segmentation.cutoff._BLOCK", 100)
        found = cutoff_counts(p, reference, region=inside)
        counted = np.ones(p.shape, dtype=bool) if inside is None else inside
        assert found.reference == (reference & counted).sum()
        for k, cutoff in enumerate(CUTOFFS):
            mask = (p >= kind(cutoff)) & counted
            assert found.predicted[k] == mask.sum()
            assert found.tp[k] == (mask & reference).sum()
            assert found.dice[k] == pytest.approx(2 * found.tp[k] / max(1, mask.sum() + found.reference))


def brute_force(maps: list, references: list, overlaps: list[float]) -> np.ndarray:
    scores = np.zeros((len(CUTOFFS), len(overlaps)))
    for c, cutoff in enumerate(CUTOFFS):
        masks = [(p >= cutoff, r) for p, r in zip(maps, references, strict=True)]
        dice = [2 * (mask & r).sum() / max(1, mask.sum() + r.sum()) for mask, r in masks]
        for t, overlap in enumerate(overlaps):
            found = [d for d in dice if d >= overlap]
            scores[c, t] = ((np.mean(found) if found else 0) + len(found) / len(dice)) / 2
    return scores


def test_the_search_is_that_over_every_pair() -> None:
    rng = np.random.default_rng(1)
    references = [blobs((8, 9, 7), seed) for seed in range(9)]
    maps = [np.clip(0.5 * r + rng.normal(0.25, 0.2, r.shape), 0, 1) for r in references]
    overlaps = [0.0, 0.5, 0.7, 0.9]
    counts = [cutoff_counts(p, r) for p, r in zip(maps, references, strict=True)]
    counts.append(cutoff_counts(maps[0], np.zeros((8, 9, 7))))  # nothing to find: takes no part
    found = best_cutoff(counts, overlaps=overlaps)
    expected = brute_force(maps, references, overlaps)
    assert found.scores == pytest.approx(expected)
    assert found.score == pytest.approx(expected.max())
    assert found.score == pytest.approx((found.dice + found.recall) / 2)
    assert expected[CUTOFFS.index(found.cutoff), overlaps.index(found.overlap)] == pytest.approx(expected.max())


def test_ties_go_to_the_cutoff_nearest_to_a_half() -> None:
    sure = np.zeros((4, 4))
    sure[1:3, 1:3] = 1
    found: BestCutoff = best_cutoff([cutoff_counts(sure, sure)], overlaps=(0.0, 0.5))
    assert (found.cutoff, found.overlap, found.score) == (0.5, 0.0, 1.0)


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(InputError, match="NaN or outside"):
        cutoff_counts(np.array([np.nan]), np.array([1]))
    with pytest.raises(InputError, match="NaN or outside"):
        cutoff_counts(np.array([2.5]), np.array([1]))
    with pytest.raises(InputError, match="one shape"):
        cutoff_counts(np.zeros(3), np.zeros(4))
    with pytest.raises(InputError, match="ascending"):
        cutoff_counts(np.zeros(3), np.zeros(3), (0.5, 0.5))
    with pytest.raises(InputError, match="no validation case"):
        best_cutoff([cutoff_counts(np.zeros(3), np.zeros(3))])
    with pytest.raises(InputError, match="overlaps"):
        best_cutoff([cutoff_counts(np.ones(3), np.ones(3))], overlaps=(2.0,))
    assert cutoff_counts(np.zeros((0, 3)), np.zeros((0, 3))).dice.tolist() == [0] * 10
