"""What brightness alone finds: one intensity cut and the pieces it leaves inside the skull, on the same folds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, binary_fill_holes, distance_transform_edt, label

from tasks.common.crossval import Fold

Load = Callable[[str], tuple[NDArray, NDArray, NDArray]]
_SMALLEST_ML = 0.2


@dataclass(frozen=True)
class Settings:
    """What is chosen on the training cases.

    Attributes:
        cut: intensity in deviations above the mean of the search region; what is brighter is a candidate.
        depth: candidates lie at least this deep below the skin, millimetres, to leave out scalp and skull.
        below: candidates lie at most this far below the top of the head, millimetres, to leave out the face.
        core: a piece must have this many voxels with all six neighbours in it, to leave out vessels and sinuses.
        thickest: keep the piece with the most of them only.
    """

    cut: float
    depth: float
    below: float
    core: int
    thickest: bool


GRID = tuple(
    Settings(cut, depth, below, core, thickest)
    for depth, below, cut, core, thickest in itertools.product(
        (12.0, 15.0), (95.0, 120.0), (0.7, 1.1, 1.5, 2.0, 2.6, 3.3), (0, 3, 12), (True, False)
    )
)


def threshold_baseline(load: Load, folds: Sequence[Fold]) -> dict[str, Any]:
    """Dice of every test case with the settings that were best on the fold's training cases.

    Args:
        load: case id -> image (X, Y, Z), reference (X, Y, Z) with tumour where it is not 0, and affine (4, 4) to mm,
            RAS+.

    Returns:
        ``what``; ``cases``, case id -> Dice, NaN where the reference is empty; ``dice``, their mean; ``found``, the
        share of cases with a tumour that have any overlap; ``false_positives``, the share of cases without one where
        one was seen; and ``settings`` of every fold.
    """
    names = sorted({case for fold in folds for case in (*fold.train, *fold.val, *fold.test)})
    scores = {name: _scores(*load(name)) for name in names}
    cases: dict[str, float] = {}
    seen: list[bool] = []
    chosen: list[dict[str, Any]] = []
    for fold in folds:
        best = _choose([scores[name] for name in (*fold.train, *fold.val)])
        chosen.append({**asdict(GRID[best]), "fold": len(chosen)})
        for name in fold.test:
            dice, predicted = scores[name]
            cases[name] = float(dice[best])
            if np.isnan(dice[best]):
                seen.append(bool(predicted[best] > 0))
    dice = np.array([value for value in cases.values() if not np.isnan(value)])
    return {
        "what": "intensity cut below skin and skull, chosen on the training cases, same folds",
        "cases": cases,
        "dice": float(dice.mean()) if len(dice) else float("nan"),
        "found": float((dice > 0).mean()) if len(dice) else float("nan"),
        "false_positives": float(np.mean(seen)) if seen else float("nan"),
        "settings": chosen,
    }


def predict(image: NDArray, affine: NDArray, settings: Settings) -> NDArray[np.bool_]:
    """The tumour (X, Y, Z) as ``settings`` see it."""
    head = _Head(image, affine)
    z, region = head.search(settings.depth, settings.below)
    pieces = _Pieces(region & (z >= settings.cut), head.spacing)
    return np.asarray(pieces.keep(settings)[pieces.labels])


class _Head:
    """Where the skin and the top of the head are."""

    def __init__(self, image: NDArray, affine: NDArray) -> None:
        self.image = np.asarray(image, np.float32)
        self.spacing = np.linalg.norm(affine[:3, :3], axis=0)
        head = binary_fill_holes(self.image > 0.12 * np.percentile(self.image, 99.5))
        self.depth = distance_transform_edt(head, sampling=self.spacing)
        axes = np.ogrid[tuple(slice(n) for n in self.image.shape)]
        height = sum(axis * rise for axis, rise in zip(axes, affine[2, :3], strict=True))
        top = np.percentile(height[head], 99.9) if head.any() else 0.0
        self.below = top - height

    def search(self, depth: float, below: float) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Deviations from the mean of the search region, and the region."""
        region = (self.depth >= depth) & (self.below <= below)
        inside = self.image[region]
        if not inside.size:
            return np.zeros_like(self.image), region
        return (self.image - inside.mean()) / (float(inside.std()) or 1.0), region


class _Pieces:
    """Connected pieces of a mask with their volume and the voxels of their core."""

    def __init__(self, mask: NDArray[np.bool_], spacing: NDArray) -> None:
        self.labels, count = label(mask)
        self.counts = np.bincount(self.labels.ravel(), minlength=count + 1)
        self.volumes = self.counts * float(np.prod(spacing)) / 1000
        self.core = np.bincount(self.labels[binary_erosion(mask)], minlength=count + 1)

    def keep(self, settings: Settings) -> NDArray[np.bool_]:
        """Which pieces (count + 1) are called tumour; piece 0 is the background."""
        kept = (self.volumes >= _SMALLEST_ML) & (self.core >= settings.core)
        kept[0] = False
        if settings.thickest and kept.any():
            kept &= np.arange(len(kept)) == np.where(kept, self.core, -1).argmax()
        return np.asarray(kept)


def _scores(image: NDArray, reference: NDArray, affine: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Dice and predicted voxels of every setting of ``GRID``; Dice is NaN where the reference is empty."""
    head, truth = _Head(image, affine), reference != 0
    dice, predicted = np.full(len(GRID), np.nan), np.zeros(len(GRID))
    for (depth, below), of_region in itertools.groupby(enumerate(GRID), key=lambda s: (s[1].depth, s[1].below)):
        z, region = head.search(depth, below)
        for cut, group in itertools.groupby(of_region, key=lambda s: s[1].cut):
            pieces = _Pieces(region & (z >= cut), head.spacing)
            common = np.bincount(pieces.labels[truth], minlength=len(pieces.counts))
            for index, settings in group:
                kept = pieces.keep(settings)
                predicted[index] = pieces.counts[kept].sum()
                if truth.any():
                    dice[index] = 2 * common[kept].sum() / (predicted[index] + truth.sum())
    return dice, predicted


def _choose(scores: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> int:
    """The setting with the best mean; a case without tumour counts 1 when nothing is seen in it and 0 otherwise."""
    table = [np.where(np.isnan(dice), predicted == 0, dice) for dice, predicted in scores]
    return int(np.mean(table, axis=0).argmax())
