"""What models say of cases: predictions as a table, and the metrics of such a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from tasks.common.bootstrap import Interval, aggregate_by_group, bootstrap_intervals
from tasks.common.metrics import METRIC_LABELS, classification_metrics
from tasks.wsi_mil.checkpoint import SlideClassifier
from tasks.wsi_mil.data import BagDataset, Case, FeatureCache
from tasks.wsi_mil.model import DEFAULT_ATTENTION
from tasks.wsi_mil.targets import Target

# Columns of a predictions table that stay text when it is read back.
AS_TEXT = {"case_id": str, "patient": str, "label": str, "predicted": str}


def predict_cases(classifier: SlideClassifier, cases: Sequence[Case], cache: FeatureCache | None) -> pd.DataFrame:
    """One row per case: id, patient, label, prediction, probability of each class (mean and SD over the models)."""
    dataset = BagDataset(cases, None, cache)
    rows = []
    for case in cases:
        outcome = classifier.predict(dataset.features(case))
        rows.append({"case_id": case.case_id, "patient": case.patient, "tiles": case.num_tiles}
                    | _label_columns(case.label, outcome.probabilities, classifier.target)
                    | {f"p_{name}": float(p) for name, p in zip(classifier.classes, outcome.probabilities, strict=True)}
                    | ({f"sd_{name}": float(s) for name, s in
                        zip(classifier.classes, outcome.model_probabilities.std(0, correction=0), strict=True)}
                       if len(classifier.models) > 1 else {}))  # fmt: skip
    return pd.DataFrame(rows)


def arrays(predictions: pd.DataFrame, target: Target) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, C) and targets, class indices (n,) or a 0/1 matrix (n, C), of a predictions table."""
    probabilities = predictions[[f"p_{name}" for name in target.classes]].to_numpy(float)
    if target.kind == "multilabel":
        return probabilities, predictions[[f"true_{name}" for name in target.classes]].to_numpy(int)
    index = {name: position for position, name in enumerate(target.classes)}
    return probabilities, predictions["label"].map(index).to_numpy(int)


def summarise(predictions: pd.DataFrame, target: Target, cfg: DictConfig) -> dict[str, Any]:
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
        "attention": chosen_attention(cfg)["name"],
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


def chosen_attention(cfg: DictConfig) -> dict[str, Any]:
    """Name and parameters of the pooler that was asked for, or the task's default."""
    chosen = cfg.get("attention")
    if chosen is None:
        return {"name": DEFAULT_ATTENTION}
    return {str(key): value for key, value in OmegaConf.to_object(chosen).items()}  # type: ignore[union-attr]


def _label_columns(label: int | tuple[int, ...], probabilities: torch.Tensor, target: Target) -> dict[str, Any]:
    predicted = target.predicted(probabilities[None])[0]
    if target.kind == "multilabel":
        assert isinstance(label, tuple)
        truth = {f"true_{name}": value for name, value in zip(target.classes, label, strict=True)}
        return truth | {f"predicted_{name}": int(v) for name, v in zip(target.classes, predicted, strict=True)}
    assert isinstance(label, int)
    return {"label": target.classes[label], "predicted": target.classes[int(predicted)]}


def _degenerate(intervals: Mapping[str, Interval], cases: int) -> list[str]:
    """What to know of an interval of no width: resampling cannot show doubt that the sample does not hold."""
    flat = [METRIC_LABELS[n] for n, ends in intervals.items() if n in METRIC_LABELS and ends.low == ends.high]
    if not flat:
        return []
    return [f"{', '.join(flat)} came out the same in every resample; on {cases} cases that is no proof of certainty."]
