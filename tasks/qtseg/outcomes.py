"""The outcome of each image on disk as soon as it is known, and all of them together."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import DictConfig

from tasks.common.crossval import Fold
from tasks.common.files import write_json
from tasks.common.results import AS_TEXT
from tasks.common.segmentation.intervals import statistic_intervals
from tasks.common.segmentation.ranking_counts import RankingCounts
from tasks.common.segmentation.summary import summarise_cases
from tasks.qtseg.data import ImageSet2D, Sample
from tasks.qtseg.loading import read_sample, read_second
from tasks.qtseg.mask_files import write_mask, write_probability
from tasks.qtseg.preprocessing import Preprocessing
from tasks.qtseg.scoring import RULES, Scoring, ranked, score
from tasks.qtseg.segment import Cut, Segmented

Floats = NDArray[np.float64]
_COUNTS = ("tp", "fp", "fn", "tn")

CHOSEN_ON_TEST = (
    "protocol=released: the epoch was chosen on the very images that are reported, as QTSeg's code does, so that the "
    "figures are too good; protocol=honest chooses it on validation images."
)
COUNTED_AS_RELEASED = (
    "protocol=released: overlap is counted at the network's size with its padding, which adds easy background, as "
    "QTSeg's code does; protocol=honest counts at the image's own size."
)


class Outcomes:
    """Masks and metrics of the images of one folder: ``masks/CASE.png`` and ``scores/CASE.json``.

    The scores of an image are written after its mask, so that one that has them is finished.
    """

    def __init__(
        self, folder: Path, images: ImageSet2D, scoring: Scoring, preprocessing: Preprocessing, probabilities: bool
    ) -> None:
        self.folder, self.images, self.scoring = folder, images, scoring
        self.preprocessing, self.probabilities = preprocessing, probabilities

    def has(self, sample: Sample) -> bool:
        """Whether the image is finished."""
        return self._scores(sample).exists()

    def add(
        self, sample: Sample, reference: NDArray[np.uint8], fov: NDArray[np.uint8] | None, found: Segmented, cut: Cut
    ) -> None:
        """Cut, write and score one image, given its reference and field of view (H, W) as they are in the files."""
        classes = self.images.classes
        probabilities = found.probabilities()
        mask = cut.mask(probabilities)
        write_mask(self.folder / "masks" / f"{sample.case_id}.png", mask, classes)
        if self.probabilities:
            write_probabilities(self.folder / "probabilities", sample.case_id, probabilities, classes)
        ranking = None
        if self.scoring.released:
            small = self.preprocessing.label_canvas(reference)
            scores = score(cut.mask(found.seen.numpy()), small, None, classes, self.scoring)
        else:
            ranking = ranked(probabilities, reference, fov)
            scores = score(mask, reference, fov, classes, self.scoring, ranking)
        content: dict[str, Any] = {"scores": {k: None if math.isnan(v) else v for k, v in scores.items()}}
        if ranking is not None:
            content |= {"inside": ranking.inside.tolist(), "outside": ranking.outside.tolist()}
        write_json(self._scores(sample), content)

    def table(self, samples: Sequence[Sample], fold: Fold | None = None) -> pd.DataFrame:
        """A row for each of the images, all of which are finished."""
        rows = []
        for sample in samples:
            scores = json.loads(self._scores(sample).read_text())["scores"]
            place = {} if fold is None else {"fold": fold.index, "repeat": fold.repeat}
            row = {"case_id": sample.case_id, "patient": sample.patient, **place}
            row |= {name: math.nan if value is None else value for name, value in scores.items()}
            rows.append({**row, "mask": str(Path("masks") / f"{sample.case_id}.png")})
        return pd.DataFrame(rows)

    def _scores(self, sample: Sample) -> Path:
        return self.folder / "scores" / f"{sample.case_id}.json"


def write_probabilities(folder: Path, name: str, probabilities: NDArray[np.float32], classes: Sequence[str]) -> None:
    """``NAME.png`` of one structure, ``NAME_CLASS.png`` of several."""
    for k, of in enumerate(classes[1:], start=1):
        ending = "" if len(classes) == 2 else f"_{k}_{''.join(c if c.isalnum() else '_' for c in of)}"
        write_probability(folder / f"{name}{ending}.png", probabilities[k])


def read_outcomes(folders: Sequence[Path]) -> pd.DataFrame:
    """The tables of finished folds, worst Dice first; masks are named from the folder of the run."""
    tables = []
    for folder in folders:
        table = pd.read_csv(folder / "predictions.csv", dtype={**AS_TEXT, "mask": str})
        tables.append(table.assign(mask=[str(Path(folder.name) / mask) for mask in table["mask"]]))
    return worst_first(pd.concat(tables, ignore_index=True))


def worst_first(table: pd.DataFrame) -> pd.DataFrame:
    """Lowest Dice first; images without any structure last."""
    return table.sort_values(["dice", "fp"], ascending=[True, False], ignore_index=True)


def read_rankings(table: pd.DataFrame, folder: Path) -> RankingCounts | None:
    """Pixels by probability of every image of a table, (n, LEVELS); None under the released protocol."""
    sides: dict[str, list[Any]] = {"inside": [], "outside": []}
    for mask, name in zip(table["mask"], table["case_id"], strict=True):
        content = json.loads((folder / mask).parents[1].joinpath("scores", f"{name}.json").read_text())
        if "inside" not in content:
            return None
        for side, found in sides.items():
            found.append(np.asarray(content[side], np.int64))
    return RankingCounts(np.stack(sides["inside"]), np.stack(sides["outside"]))


def summarise(
    table: pd.DataFrame,
    images: ImageSet2D,
    scoring: Scoring,
    rankings: RankingCounts | None,
    cfg: DictConfig,
    chosen_here: bool,
) -> dict[str, Any]:
    """Metrics with intervals over patients: the mean of the images, and of all pixels together.

    Args:
        chosen_here: the epoch was chosen on these images.
    """
    sampling: dict[str, Any] = {
        "num_samples": cfg.evaluation.bootstrap,
        "level": cfg.evaluation.level,
        "seed": cfg.seed,
    }
    names = scoring.metrics(images.classes)
    summary = summarise_cases(table, names, **sampling)
    summary["protocol"] = "released" if scoring.released else "honest"
    summary["classes"] = list(images.classes)
    summary["definitions"] = [
        "Each metric is computed for every image and averaged"
        + (", at the network's size, padding included." if scoring.released else ", at the image's own size")
        + ("" if scoring.released else (", inside the field of view." if _has_fov(images) else ".")),
        f"Empty masks: {RULES[scoring.empty]}.",
        *summary["definitions"],
    ]
    summary["pixels"] = pixel_metrics(table, rankings, **sampling)
    counted = [COUNTED_AS_RELEASED] if scoring.released else []
    summary["notes"] = [*([CHOSEN_ON_TEST] if chosen_here else []), *counted, *summary["notes"]]
    return summary


def _has_fov(images: ImageSet2D) -> bool:
    return any(sample.fov is not None for sample in images.samples)


def pixel_metrics(table: pd.DataFrame, rankings: RankingCounts | None, **sampling: Any) -> dict[str, dict[str, float]]:
    """Metrics of the pixels of all images together, as most papers on vessels report them (F1 is the Dice)."""
    counts = table[list(_COUNTS)].to_numpy(np.float64)

    def statistics(weights: Floats) -> dict[str, Floats]:
        tp, fp, fn, tn = (weights @ counts).T
        with np.errstate(divide="ignore", invalid="ignore"):
            found = {
                "dice": 2 * tp / (2 * tp + fp + fn),
                "iou": tp / (tp + fp + fn),
                "sensitivity": tp / (tp + fn),
                "specificity": tn / (tn + fp),
                "precision": tp / (tp + fp),
                "accuracy": (tp + tn) / (tp + fp + fn + tn),
            }
        if rankings is not None:
            found["auc"] = RankingCounts(weights @ rankings.inside, weights @ rankings.outside).aucs()
        return found

    values = statistics(np.ones((1, len(table))))
    ends = statistic_intervals(statistics, len(table), list(table["patient"]), **sampling)
    return {n: {"value": float(v[0]), "low": ends[n].low, "high": ends[n].high} for n, v in values.items()}


def second_reader(
    samples: Sequence[Sample], images: ImageSet2D, scoring: Scoring, cfg: DictConfig
) -> dict[str, Any] | None:
    """A second reader scored against the first, by the same rules as the network; None where there is none."""
    if scoring.released:
        return None
    rows = []
    for sample in samples:
        second = read_second(sample, images.coding)
        if second is None:
            continue
        _, reference, fov = read_sample(sample, images.coding)
        scores = score(second, reference, fov, images.classes, scoring)
        rows.append({"case_id": sample.case_id, "patient": sample.patient, **scores})
    if not rows:
        return None
    table = pd.DataFrame(rows)
    sampling = {"num_samples": cfg.evaluation.bootstrap, "level": cfg.evaluation.level, "seed": cfg.seed}
    names = [name for name in scoring.metrics(images.classes) if name in table]
    pooled = summarise_cases(table, names, **sampling)["pooled"]
    return {"cases": len(table), "pooled": pooled, "pixels": pixel_metrics(table, None, **sampling)}
