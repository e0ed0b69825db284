"""What models say of cases: predictions as a table, and the metrics of such a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from tasks.common.results import summarise as summarise_predictions
from tasks.wsi_mil.checkpoint import SlideClassifier
from tasks.wsi_mil.data import BagDataset, Case, FeatureCache
from tasks.wsi_mil.model import DEFAULT_ATTENTION
from tasks.wsi_mil.targets import Target


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


def summarise(predictions: pd.DataFrame, target: Target, cfg: DictConfig) -> dict[str, Any]:
    """:func:`tasks.common.results.summarise` with the name of the pooler."""
    return {**summarise_predictions(predictions, target, cfg), "attention": chosen_attention(cfg)["name"]}


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
