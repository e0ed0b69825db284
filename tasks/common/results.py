"""The metrics of a table of predictions: pooled with intervals over patients, and their spread over folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from tasks.common.bootstrap import Interval, aggregate_by_group, bootstrap_intervals
from tasks.common.metrics import METRIC_LABELS, classification_metrics
from tasks.common.weighted_metrics import Kind

# Columns of a predictions table that stay text when it is read back.
AS_TEXT = {"case_id": str, "patient": str, "label": str, "predicted": str}


class Classified(Protocol):
    """What the columns of a predictions table mean."""

    @property
    def kind(self) -> Kind:
        """Which kind of target."""

    @property
    def classes(self) -> Sequence[str]:
        """Names, in the order of the probabilities."""


def arrays(predictions: pd.DataFrame, target: Classified) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, C) and targets, class indices (n,) or a 0/1 matrix (n, C), of a predictions table."""
    probabilities = predictions[[f"p_{name}" for name in target.classes]].to_numpy(float)
    if target.kind == "multilabel":
        return probabilities, predictions[[f"true_{name}" for name in target.classes]].to_numpy(int)
    index = {name: position for position, name in enumerate(target.classes)}
    return probabilities, predictions["label"].map(index).to_numpy(int)


def summarise(predictions: pd.DataFrame, target: Classified, cfg: DictConfig) -> dict[str, Any]:
    """Pooled metrics with bootstrap intervals over patients, and mean and SD over the folds; labelled as such."""
    probabilities, truth = arrays(predictions, target)
    pooled = classification_metrics(probabilities, truth, target.kind, target.classes)
    intervals = bootstrap_intervals(
        probabilities,
        truth,
        target.kind,
        groups=list(predictions["patient"]),
        num_samples=cfg.evaluation.bootstrap,
        level=cfg.evaluation.level,
        seed=cfg.seed,
        classes=target.classes,
    )
    summary: dict[str, Any] = {
        "cases": int(predictions["case_id"].nunique()),
        "patients": int(predictions["patient"].nunique()),
        "target": target.kind,
        "classes": list(target.classes),
        "interval": f"{cfg.evaluation.level:.0%}, {cfg.evaluation.bootstrap} bootstrap resamples of patients",
        "pooled": {
            name: {"value": value, "low": intervals[name].low, "high": intervals[name].high}
            if name in intervals
            else {"value": value}
            for name, value in pooled.items()
        },
        "notes": [*pooled.notes, *_degenerate(intervals, len(predictions))],
    }
    if summary["patients"] < summary["cases"]:
        joined = aggregate_by_group(probabilities, truth, list(predictions["patient"]))
        by_patient = classification_metrics(joined.probabilities, joined.targets, target.kind, target.classes)
        summary["by_patient"] = {"what": "mean of the probabilities of a patient's slides", **by_patient}
    if "fold" in predictions:
        per_fold = []
        for _, part in predictions.groupby(["repeat", "fold"], sort=True):
            scores = classification_metrics(*arrays(part, target), target.kind, target.classes)
            per_fold.append(
                {"repeat": int(part["repeat"].iloc[0]), "fold": int(part["fold"].iloc[0]), "cases": len(part)} | scores
            )
        frame = pd.DataFrame(per_fold).drop(columns=["repeat", "fold", "cases"])
        summary["folds"] = {
            name: {"mean": float(column.mean()), "sd": float(column.std(ddof=1)), "n": int(column.notna().sum())}
            for name, column in frame.items()
        }
        summary["per_fold"] = per_fold
    return summary


def _degenerate(intervals: Mapping[str, Interval], cases: int) -> list[str]:
    """What to know of an interval of no width: resampling cannot show doubt that the sample does not hold."""
    flat = [METRIC_LABELS[n] for n, ends in intervals.items() if n in METRIC_LABELS and ends.low == ends.high]
    if not flat:
        return []
    return [f"{', '.join(flat)} came out the same in every resample; on {cases} cases that is no proof of certainty."]
