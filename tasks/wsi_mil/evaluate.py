"""``action=evaluate``: a trained classifier, or an ensemble of folds, on a labelled cohort."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.common.checkpoints import find_checkpoints, hashed
from tasks.common.devices import device_for
from tasks.common.files import atomic_path
from tasks.common.report import Report
from tasks.common.result_report import add_figures, key_figures, metrics_table, prediction_figures
from tasks.wsi_mil.checkpoint import load_checkpoint, load_classifier
from tasks.wsi_mil.data import Case, Cohort, load_cohort, make_cache
from tasks.wsi_mil.results import predict_cases, summarise
from tasks.wsi_mil.targets import Target

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Predict every labelled case of ``data.features`` and write predictions, metrics, plots and a report to ``out``.

    Raises:
        InputError: no checkpoint, features of another size, or labels the classifier does not know.
    """
    if cfg.checkpoint is None:
        raise InputError("action=evaluate needs checkpoint=RUN, a run folder, a fold folder or a model.safetensors.")
    classifier = load_classifier(Path(cfg.checkpoint))
    cohort = with_classes_of(load_cohort(cfg.data), classifier.target)
    seen = trained_on(Path(cfg.checkpoint), cohort.cases)
    if seen:
        log.warning(
            "%d of %d cases were used to train this checkpoint (%s ...): the figures are too good for them.",
            len(seen), len(cohort.cases), seen[0],
        )  # fmt: skip
    if cfg.dry_run:
        log.info("would evaluate %d cases with %d models", len(cohort.cases), len(classifier.models))
        return {}
    classifier.to(device_for(cfg.inference.device))
    predictions = predict_cases(classifier, cohort.cases, make_cache(cohort.cases, False))
    metrics = summarise(predictions, classifier.target, cfg)
    metrics["attention"] = classifier.description.attention["name"]
    metrics["checkpoint"] = str(cfg.checkpoint)
    if seen:
        metrics["notes"] = [*metrics["notes"], f"{len(seen)} cases were used to train this checkpoint"]
    _write(out, predictions, metrics, classifier.target)
    log.info("report: %s", out / "report.html")
    return metrics


def with_classes_of(cohort: Cohort, target: Target) -> Cohort:
    """The cohort with its labels counted as the classifier counts them.

    Raises:
        InputError: a label the classifier does not know.
    """
    known = {name: position for position, name in enumerate(target.classes)}
    strange = [name for name in cohort.target.classes if name not in known]
    if strange:
        raise InputError(f"label {', '.join(strange)} is not one of the checkpoint's classes {list(target.classes)}.")
    if target.kind == "multilabel":
        if cohort.target.classes != target.classes:
            raise InputError(f"data.label_column must name the checkpoint's labels in order: {list(target.classes)}.")
        return replace(cohort, target=target)

    def renumber(case: Case) -> Case:
        assert isinstance(case.label, int)
        return replace(case, label=known[cohort.target.classes[case.label]])

    return replace(cohort, cases=tuple(renumber(case) for case in cohort.cases), target=target)


def trained_on(checkpoint: Path, cases: tuple[Case, ...]) -> list[str]:
    """Ids of the cases that the checkpoint's training or validation set held."""
    known = {
        name for path in find_checkpoints(checkpoint) for name in load_checkpoint(path)[1].training.get("cases", [])
    }
    return [case.case_id for case in cases if hashed(case.case_id) in known]


def _write(out: Path, predictions: Any, metrics: dict[str, Any], target: Target) -> None:
    with atomic_path(out / "predictions.csv") as temporary:
        predictions.to_csv(temporary, index=False)
    with atomic_path(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2))
    report = Report(
        f"Evaluation of {metrics['attention']}", f"{metrics['cases']} cases; checkpoint {metrics['checkpoint']}"
    )
    report.add_heading("Results")
    report.add_key_figures(key_figures(metrics))
    report.add_notes(metrics["notes"])
    report.add_table(metrics_table(metrics), f"Intervals: {metrics['interval']}.")
    add_figures(report, prediction_figures(predictions, target), out)
    report.add_details("All predictions", predictions.round(4).to_string(index=False))
    report.write(out / "report.html")
