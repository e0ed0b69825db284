"""The outcome of each case on disk as soon as it is known, and all of them together."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from torch import Tensor

from kernels.errors import InputError
from tasks.common.crossval import Fold
from tasks.common.files import write_json
from tasks.common.results import AS_TEXT
from tasks.common.segmentation.agreement import bland_altman
from tasks.common.segmentation.growth import growth
from tasks.common.segmentation.intervals import Found, ratio_intervals
from tasks.common.segmentation.summary import summarise_cases
from tasks.common.volumes.reading import read_label
from tasks.common.volumes.writing import write_mask, write_probabilities
from tasks.meningioma.cases import Case, CaseSet
from tasks.meningioma.preparation import Prepared
from tasks.meningioma.scoring import Scoring, score_case
from tasks.meningioma.segment import Cut, mask_of


class Outcomes:
    """Masks and metrics of the cases of one folder: ``masks/CASE.nii.gz`` and ``scores/CASE.json``.

    The scores of a case are written after its mask, so that a case that has them is finished.
    """

    def __init__(self, folder: Path, cases: CaseSet, scoring: Scoring, probabilities: bool = False) -> None:
        self.folder, self.cases, self.scoring, self.probabilities = folder, cases, scoring, probabilities

    def has(self, case: Case) -> bool:
        """Whether the case is finished."""
        return self._scores(case).exists()

    def add(self, case: Case, prepared: Prepared, probabilities: Tensor, cut: Cut) -> None:
        """Cut, write and score one case with probabilities (K, D, H, W)."""
        image = case.read_images()[0]
        mask = mask_of(prepared, probabilities, image.affine, cut)
        reference = self.cases.read_label(case).data
        write_mask(self.folder / "masks" / f"{case.case_id}.nii.gz", mask, image)
        if self.probabilities:
            path = self.folder / "probabilities" / f"{case.case_id}.nii.gz"
            write_probabilities(path, prepared.restore(probabilities)[1:], image)
        scores = score_case(mask, reference, image.affine, self.cases.classes, self.scoring)
        write_json(self._scores(case), {k: None if math.isnan(v) else v for k, v in scores.items()})

    def table(self, cases: Sequence[Case], fold: Fold | None = None) -> pd.DataFrame:
        """A row for each of the cases, all of which are finished."""
        rows = []
        for case in cases:
            scores = {k: math.nan if v is None else v for k, v in json.loads(self._scores(case).read_text()).items()}
            place = {} if fold is None else {"fold": fold.index, "repeat": fold.repeat}
            mask = str(Path("masks") / f"{case.case_id}.nii.gz")
            rows.append({"case_id": case.case_id, "patient": case.patient, **place, **scores, "mask": mask})
        return pd.DataFrame(rows)

    def _scores(self, case: Case) -> Path:
        return self.folder / "scores" / f"{case.case_id}.json"


def read_outcomes(folders: Sequence[Path]) -> pd.DataFrame:
    """The tables of finished folds, worst Dice first; masks are named from the folder of the run."""
    tables = []
    for folder in folders:
        table = pd.read_csv(folder / "predictions.csv", dtype={**AS_TEXT, "mask": str})
        tables.append(table.assign(mask=[str(Path(folder.name) / mask) for mask in table["mask"]]))
    return worst_first(pd.concat(tables, ignore_index=True))


def worst_first(table: pd.DataFrame) -> pd.DataFrame:
    """Lowest Dice first; cases without a structure last, those with false alarms before the others."""
    return table.sort_values(["dice", "predicted_ml"], ascending=[True, False], ignore_index=True)


def summarise(table: pd.DataFrame, cases: CaseSet, scoring: Scoring, cfg: DictConfig) -> dict[str, Any]:
    """Metrics with intervals over patients: by case, patient-wise under each convention, by object, and of volumes."""
    sampling: dict[str, Any] = {
        "num_samples": cfg.evaluation.bootstrap,
        "level": cfg.evaluation.level,
        "seed": cfg.seed,
    }
    found = Found("tp", 0.0, scoring.overlap)
    summary = summarise_cases(table, found=found, volume_limit_ml=scoring.limit_ml, **sampling)
    summary["classes"] = list(cases.classes)
    summary["conventions"] = {
        name: {
            metric: row
            for metric, row in summarise_cases(table, ["dice"], rule, scoring.limit_ml, **sampling)["pooled"].items()
            if metric.startswith("patient_") or metric == "dice_tp"
        }
        for name, rule in (
            ("all", Found("all", 0.0, scoring.overlap)),
            ("positive", Found("positive", scoring.limit_ml, scoring.overlap)),
            ("tp", Found("tp", scoring.limit_ml, scoring.overlap)),
        )
    }
    summary["objects"] = _objects(table, sampling)
    summary["volumes"] = _volumes(table)
    return summary


def _objects(table: pd.DataFrame, sampling: dict[str, Any]) -> dict[str, Any]:
    found, there = table["found_objects"], table["reference_objects"]
    ratios = {
        "recall": (found, there),
        "precision": (found, table["predicted_objects"]),
        "f1": (2 * found, there + table["predicted_objects"]),
        "recall_large": (table["found_large_objects"], table["large_objects"]),
        "recall_small": (found - table["found_large_objects"], there - table["large_objects"]),
    }
    ends = ratio_intervals(ratios, list(table["patient"]), **sampling)
    pooled = {}
    for name, (numerator, denominator) in ratios.items():
        total = float(denominator.sum())
        value = float(numerator.sum()) / total if total else math.nan
        pooled[name] = {"value": value, "low": ends[name].low, "high": ends[name].high, "of": int(total)}
    return pooled


def _volumes(table: pd.DataFrame) -> dict[str, Any]:
    """Agreement of volumes over the cases that have a structure on either side."""
    there = table[(table["reference_ml"] > 0) | (table["predicted_ml"] > 0)]
    if len(there) < 3:
        return {}
    try:
        agreement = bland_altman(there["predicted_ml"], there["reference_ml"])
    except InputError:
        return {}
    return {
        "cases": len(there),
        "bias_ml": agreement.bias,
        "bias_low": agreement.bias_interval.low,
        "bias_high": agreement.bias_interval.high,
        "lower_limit_ml": agreement.lower,
        "upper_limit_ml": agreement.upper,
    }


def growth_table(cases: Sequence[Case], masks: dict[str, Path], level: float, seed: int) -> pd.DataFrame:
    """A row for each two successive dated scans of a patient, from the masks of the cases; empty without any."""
    dated: dict[str, list[Case]] = {}
    for case in cases:
        if case.date is not None and case.case_id in masks:
            dated.setdefault(case.patient, []).append(case)
    rows = []
    for patient, scans in dated.items():
        ordered = sorted(scans, key=lambda case: str(case.date))
        for first, second in itertools.pairwise(ordered):
            if first.date == second.date or first.date is None or second.date is None:
                continue
            one, two = read_label(masks[first.case_id]), read_label(masks[second.case_id])
            change = growth(
                one.data > 0, one.affine, first.date, two.data > 0, two.affine, second.date, level=level, seed=seed
            )
            rows.append(
                {
                    "patient": patient,
                    "first": first.case_id,
                    "second": second.case_id,
                    "days": change.days,
                    "first_ml": change.first_ml,
                    "second_ml": change.second_ml,
                    "ml": change.ml,
                    "ml_low": change.ml_interval.low,
                    "ml_high": change.ml_interval.high,
                    "percent": change.percent,
                    "percent_low": change.percent_interval.low,
                    "percent_high": change.percent_interval.high,
                    "ml_per_year": change.ml_per_year,
                    "doubling_days": change.doubling_days,
                }
            )
    return pd.DataFrame(rows).replace({np.inf: np.nan})
