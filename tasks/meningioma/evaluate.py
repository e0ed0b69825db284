"""``action=evaluate``: a trained segmenter, or the ensemble of a run's folds, on labelled cases."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.common.devices import device_for
from tasks.common.files import atomic_path, write_json
from tasks.common.progress import ProgressBars
from tasks.common.runs import open_run
from tasks.common.segmentation.checkpoint import inference_of
from tasks.common.segmentation.new_cases import not_trained_on
from tasks.meningioma.data import load_cases, overview
from tasks.meningioma.model import load
from tasks.meningioma.outcomes import Outcomes, summarise, worst_first
from tasks.meningioma.preparation import Preparation
from tasks.meningioma.report import print_result, write_report
from tasks.meningioma.scoring import Scoring
from tasks.meningioma.segment import Cut, probabilities_of

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Segment and score every labelled case of ``data.path``; masks, metrics and a report go to ``out``.

    A run that was stopped goes on with the cases that are left. With ``evaluation.unseen`` the cases that the
    checkpoint was trained or chosen on are left out.

    Raises:
        InputError: no checkpoint, cases that cannot be used, or classes that are not the checkpoint's.
    """
    scoring = Scoring.of(cfg.evaluation)
    segmenter = load(cfg)
    description = segmenter.description
    how = inference_of(segmenter, cfg.inference)
    device = device_for(cfg.inference.device)
    checked = load_cases(cfg.data)
    for line in overview(checked):
        log.info("%s", line)
    cases = checked.cases
    if cases.classes != description.classes:
        raise InputError(
            f"data.path={cfg.data.path} has the classes {list(cases.classes)}, the checkpoint "
            f"{list(description.classes)}; name them alike with data.labels."
        )
    channels = int(description.network["in_channels"])
    wrong = [case.case_id for case in cases.labelled if len(case.images) != channels]
    if wrong:
        raise InputError(f"case '{wrong[0]}' does not have the {channels} channels that the checkpoint was trained on.")
    kept, seen = not_trained_on(
        cases.labelled,
        [case.case_id for case in cases.labelled],
        segmenter,
        bool(cfg.evaluation.unseen),
        cfg.checkpoint,
        "cases",
    )
    if cfg.evaluation.unseen:
        cases = replace(cases, cases=tuple(kept))
    if cfg.dry_run:
        log.info("would segment %d cases with %d networks", len(cases.labelled), len(segmenter.models))
        return {}
    with open_run(cfg, out, inputs=[cases.fingerprint()]) as current:
        folder = current.folder
        segmenter.to(device)
        preparation = Preparation.from_dict(description.preparation)
        outcomes = Outcomes(folder, cases, scoring, bool(cfg.evaluation.probabilities))
        cut = Cut.of(cfg.inference, segmenter.cutoff)
        todo = [case for case in cases.labelled if not outcomes.has(case)]
        with ProgressBars() as bars, bars.add("segmenting", total=len(todo), unit="cases", passing=True) as bar:
            for case in todo:
                prepared = preparation.prepare(case.read_images())
                outcomes.add(case, prepared, probabilities_of(segmenter, prepared, how), cut)
                bar.advance(1)
        table = worst_first(outcomes.table(cases.labelled))
        with atomic_path(folder / "results.csv") as temporary:
            table.to_csv(temporary, index=False)
        metrics: dict[str, Any] = {
            "network": description.title,
            "checkpoint": str(cfg.checkpoint),
            "cutoff": cut.cutoff,
            **summarise(table, cases, scoring, cfg),
        }
        metrics["notes"] = [*cases.notes, *metrics["notes"]]
        if seen:
            metrics["notes"].append(f"{seen} cases were used to train this checkpoint")
        write_json(folder / "metrics.json", metrics)
        title = f"Evaluation of {description.title}"
        write_report(cases, [], table, metrics, cfg, folder, title)
        current.finish()
    print_result(metrics)
    log.info("report: %s", folder / "report.html")
    return metrics
