"""The report of a cross-validation: figures, tables, and where the models looked in their best and worst cases."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.common import plots
from tasks.common.checkpoints import fold_name
from tasks.common.crossval import Fold
from tasks.common.report import Report
from tasks.common.result_report import add_figures, key_figures, metrics_table, prediction_figures, training_figures
from tasks.common.results import arrays
from tasks.wsi_mil.checkpoint import load_classifier
from tasks.wsi_mil.data import BagDataset, Case, Cohort, FeatureCache
from tasks.wsi_mil.features import TileCoords, read_coords
from tasks.wsi_mil.heatmap import colour_limits, normalise, pixel_auc, rasterise
from tasks.wsi_mil.heatmap_figure import heatmap_figure
from tasks.wsi_mil.slides import open_slide

log = logging.getLogger(__name__)

_THUMBNAIL_SIDE = 900


@dataclass(frozen=True)
class CaseAttention:
    """Attention of one test case by the model of its fold.

    Attributes:
        weights: (N,) attention weight of each tile.
        coords: where the tiles lie.
        slide: the slide file, or None when it is not there any more.
    """

    case: Case
    weights: np.ndarray
    coords: TileCoords
    slide: Path | None


def write_report(
    cohort: Cohort,
    folds: Sequence[Fold],
    predictions: pd.DataFrame,
    metrics: dict[str, Any],
    cfg: DictConfig,
    folder: Path,
    cache: FeatureCache | None,
) -> None:
    """Write ``report.html`` and ``plots/``; adds the localisation score to ``metrics`` where masks are known."""
    attended = AttentionOfCases(cohort, folds, predictions, folder, cache)
    if cfg.data.get("masks") is not None:
        metrics["localisation"] = localisation(attended, predictions, Path(cfg.data.masks))
    report = Report(
        f"Slide classification with {metrics['attention']}",
        f"{metrics['cases']} cases of {metrics['patients']} patients; classes {', '.join(metrics['classes'])}",
    )
    report.add_heading("Results on cases the models had not seen")
    report.add_key_figures(key_figures(metrics))
    report.add_notes(metrics["notes"])
    report.add_table(metrics_table(metrics), f"Intervals: {metrics['interval']}; they speak of other patients.")
    _add_plots(report, cohort, folds, predictions, folder, metrics)
    _add_heatmaps(report, attended, predictions, cohort, cfg, metrics, folder)
    report.add_heading("Cases")
    report.add_details(f"All {len(predictions)} predictions", predictions.round(4).to_string(index=False))
    report.add_details("Configuration", (folder / "config.yaml").read_text())
    report.add_details("Versions", json.dumps(json.loads((folder / "run.json").read_text())["versions"], indent=2))
    report.write(folder / "report.html")


def _add_plots(
    report: Report,
    cohort: Cohort,
    folds: Sequence[Fold],
    predictions: pd.DataFrame,
    folder: Path,
    metrics: dict[str, Any],
) -> None:
    figures = prediction_figures(predictions, cohort.target) | training_figures(folds, folder, metrics)
    add_figures(report, figures, folder)


class AttentionOfCases:
    """Attention of test cases, computed when asked for, with the model of the fold each was tested in."""

    def __init__(
        self,
        cohort: Cohort,
        folds: Sequence[Fold],
        predictions: pd.DataFrame,
        folder: Path,
        cache: FeatureCache | None,
    ) -> None:
        self._cases = {case.case_id: case for case in cohort.cases}
        names = {fold.index: fold_name(fold) for fold in folds}
        first = predictions.drop_duplicates("case_id")
        self._folds = {str(case): names[int(fold)] for case, fold in zip(first["case_id"], first["fold"], strict=True)}
        self._folder = folder
        self._dataset = BagDataset((), None, cache)
        self._classifiers: dict[str, Any] = {}

    def get(self, case_id: str) -> CaseAttention | None:
        """None when the features carry no coordinates, or the case joins several slides."""
        case = self._cases[case_id]
        if len(case.bags) > 1:
            return None
        coords = read_coords(case.bags[0])
        if coords is None:
            return None
        name = self._folds[case_id]
        if name not in self._classifiers:
            self._classifiers[name] = load_classifier(self._folder / name)
        weights = self._classifiers[name].predict(self._dataset.features(case)).mean_attention.numpy()
        path = coords.attrs.get("slide_path")
        slide = Path(str(path)) if path else None
        return CaseAttention(case, weights, coords, slide if slide is not None and slide.exists() else None)


def localisation(attended: AttentionOfCases, predictions: pd.DataFrame, masks: Path) -> dict[str, Any]:
    """Pixel AUC of attention against known regions, for every case that has a mask with a region in it.

    A mask is ``<case_id>.png``, non-zero inside; its size against the slide's gives its downsample.
    """
    scores: dict[str, float] = {}
    for case_id in predictions["case_id"].unique():
        path = masks / f"{case_id}.png"
        mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) if path.exists() else None
        found = attended.get(case_id) if mask is not None and mask.any() else None
        if mask is None or found is None:
            continue
        width = float(found.coords.attrs["level0_width"])
        auc = pixel_auc(found.weights, found.coords.xy, found.coords.size, mask > 0, width / mask.shape[1])
        if not math.isnan(auc):
            scores[case_id] = auc
    if not scores:
        return {}
    values = np.array(list(scores.values()))
    resampled = np.random.default_rng(0).choice(values, (1000, len(values))).mean(1)
    return {
        "pixel_auc": float(values.mean()),
        "low": float(np.quantile(resampled, 0.025)),
        "high": float(np.quantile(resampled, 0.975)),
        "cases": len(scores),
        "what": "mean over test slides of the area under the ROC curve of attention against known regions, by pixel",
        "per_case": scores,
    }


def _add_heatmaps(
    report: Report,
    attended: AttentionOfCases,
    predictions: pd.DataFrame,
    cohort: Cohort,
    cfg: DictConfig,
    metrics: dict[str, Any],
    folder: Path,
) -> None:
    chosen = best_and_worst(predictions, cohort, cfg.evaluation.heatmaps)
    pictures: list[tuple[Path, str]] = []
    for case_id, caption in chosen:
        found = attended.get(case_id)
        if found is None:
            continue
        path = folder / "heatmaps" / f"{case_id}.png"
        masks = cfg.data.get("masks")
        mask_path = Path(masks) / f"{case_id}.png" if masks is not None else None
        try:
            plots.save_png(_figure(found, caption, mask_path, cfg), path)
        except InputError as error:  # a slide moved or damaged since must not cost the report
            log.warning("no heat map of %s: %s", case_id, error)
            continue
        pictures.append((path, caption))
    if not pictures:
        return
    report.add_heading("Where the models looked")
    if metrics.get("localisation"):
        found_ = metrics["localisation"]
        report.add_text(
            f"Known regions are found with a pixel AUC of {found_['pixel_auc']:.3f} "
            f"({found_['low']:.3f} to {found_['high']:.3f}) on {found_['cases']} test slides."
        )
    report.add_text(
        "Each map comes from the model that had not seen the case. Colours are ranks of attention within the slide."
    )
    for path, caption in pictures:
        report.add_figure(path, caption)


def best_and_worst(predictions: pd.DataFrame, cohort: Cohort, count: int) -> list[tuple[str, str]]:
    """Case ids with captions: first those predicted right with most confidence, then those predicted worst.

    With several classes the best are taken from the later classes first, the findings one wants to see.
    """
    if cohort.target.kind == "multilabel":
        probabilities, truth = arrays(predictions, cohort.target)
        certainty = np.where(truth > 0, probabilities, 1 - probabilities).min(1)
        label = truth.sum(1).astype(str)
    else:
        label = predictions["label"].to_numpy()
        certainty = np.array([row[f"p_{row['label']}"] for _, row in predictions.iterrows()])
    table = pd.DataFrame({"case_id": predictions["case_id"], "label": label, "certainty": certainty})
    table = table.drop_duplicates("case_id")
    order = {name: position for position, name in enumerate(cohort.target.classes)}
    table["finding"] = [order.get(str(name), 0) > 0 for name in table["label"]]
    best = table.sort_values(["finding", "certainty"], ascending=False).head(count)
    worst = table[~table["case_id"].isin(best["case_id"])].sort_values("certainty").head(count)
    chosen = []
    for place, part in (("among the best", best), ("among the worst", worst)):
        for name, truth, given in zip(part["case_id"], part["label"], part["certainty"], strict=True):
            chosen.append((str(name), f"{name}: true {truth}, probability given to it {given:.2f} ({place})"))
    return chosen


def _figure(found: CaseAttention, caption: str, mask_path: Path | None, cfg: DictConfig) -> Any:
    mode = cfg.predict.mode
    values = normalise(found.weights, mode)
    attrs = found.coords.attrs
    size = (int(attrs["level0_width"]), int(attrs["level0_height"]))
    if found.slide is not None:
        with open_slide(found.slide, mpp=attrs.get("level0_mpp")) as slide:
            thumbnail = slide.thumbnail(_THUMBNAIL_SIDE)
            mpp = slide.mpp * slide.dimensions[0] / thumbnail.shape[1] if slide.mpp else None
    else:  # the map alone, on white
        scale = _THUMBNAIL_SIDE / max(size)
        thumbnail = np.full((max(1, round(size[1] * scale)), max(1, round(size[0] * scale)), 3), 255, np.uint8)
        mpp = None
    heat = rasterise(values, found.coords.xy, found.coords.size, size, size[0] / thumbnail.shape[1])
    mask = None
    if mask_path is not None and mask_path.exists():
        loaded = cv2.imread(str(mask_path), cv2.IMREAD_GRAYSCALE)
        mask = loaded if loaded is not None and loaded.any() else None
    return heatmap_figure(
        thumbnail, heat, mode=mode, limits=colour_limits(values, mode), mpp=mpp, title=caption, mask=mask
    )
