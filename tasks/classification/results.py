"""What networks say of images: predictions as a table, and the metrics of such a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from tasks.classification.checkpoint import ImageClassifier
from tasks.classification.data import Sample
from tasks.classification.loading import ImageDataset, Images, make_loader
from tasks.common.bootstrap import resample_weights
from tasks.common.results import Classified, arrays
from tasks.common.results import summarise as summarise_predictions

TOP = 5  # of at least twice as many classes


def predict_samples(
    classifier: ImageClassifier, samples: Sequence[Sample], images: Images, batch_size: int, workers: int | str = 0
) -> pd.DataFrame:
    """One row per image: id, patient, label, prediction, probability of each class (mean and SD over the models)."""
    dataset = ImageDataset(samples, images, classifier.description.preprocessing.transform())
    parts = [classifier.predict(batch.images) for batch in make_loader(dataset, batch_size, None, workers)]
    each = torch.cat(parts, 1).double()  # (models, n, C)
    mean = each.mean(0)
    names = classifier.classes
    table = pd.DataFrame({"case_id": [s.case_id for s in samples], "patient": [s.patient for s in samples]})
    table["label"] = [names[s.label] for s in samples]
    table["predicted"] = [names[int(k)] for k in mean.argmax(1)]
    table[[f"p_{name}" for name in names]] = mean.numpy()
    if len(each) > 1:
        table[[f"sd_{name}" for name in names]] = each.std(0, correction=0).numpy()
    return table


@torch.inference_mode()
def exit_logits(
    model: Any, classifier: ImageClassifier, samples: Sequence[Sample], images: Images, batch_size: int
) -> list[Tensor]:
    """Logits (N, K) of each exit of a network that has ``forward_exits``."""
    dataset = ImageDataset(samples, images, classifier.description.preprocessing.transform())
    model.eval()
    parts = [model.forward_exits(b.images.to(classifier.device)) for b in make_loader(dataset, batch_size, None, 0)]
    return [torch.cat([part[k].float().cpu() for part in parts]) for k in range(len(parts[0]))]


def worst_first(predictions: pd.DataFrame) -> pd.DataFrame:
    """The table with ``p_true``, the probability given to the right class, from the lowest to the highest."""
    given = [float(row[f"p_{row['label']}"]) for row in predictions.to_dict("records")]
    table = predictions.copy()
    table.insert(list(table.columns).index("predicted") + 1, "p_true", given)
    return table.sort_values(["p_true", "case_id"], kind="stable", ignore_index=True)


def summarise(predictions: pd.DataFrame, target: Classified, cfg: DictConfig) -> dict[str, Any]:
    """:func:`tasks.common.results.summarise`, with the top-5 accuracy where there are at least ten classes."""
    metrics = summarise_predictions(predictions, target, cfg)
    if len(target.classes) >= 2 * TOP:
        probabilities, truth = arrays(predictions, target)
        hit = top_hits(probabilities, truth)
        weights = resample_weights(truth, list(predictions["patient"]), cfg.evaluation.bootstrap, cfg.seed)
        shares = np.concatenate([block @ hit / block.sum(1) for block in weights])
        level = cfg.evaluation.level
        low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
        metrics["pooled"]["accuracy_top5"] = {"value": float(hit.mean()), "low": float(low), "high": float(high)}
    return metrics


def top_hits(probabilities: np.ndarray, truth: np.ndarray, count: int = TOP) -> np.ndarray:
    """Whether the true class (n,) is among the ``count`` most probable of (n, C), (n,) 0 or 1."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
    return (best == truth[:, None]).any(1).astype(np.float64)
