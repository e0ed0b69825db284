"""The demo as a run: make the heads, then train on them as on any others, beside a threshold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from tasks.common.crossval import Fold
from tasks.meningioma import train
from tasks.meningioma.cases import CaseSet
from tasks.meningioma.demo import make_heads
from tasks.meningioma.demo.baseline import threshold_baseline

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """From nothing to ``report.html``; the heads are kept in the cache folder for the next time."""
    settings = cfg.data.heads
    if cfg.dry_run:
        log.info("would make %d heads and train %s on them", settings.cases, cfg.network.name)
        return {}
    folder = None if settings.folder is None else Path(settings.folder)
    place = make_heads(folder, cases=settings.cases, seed=settings.seed, side=settings.side)
    filled = OmegaConf.merge(cfg, {"data": {"path": str(place)}})
    assert isinstance(filled, DictConfig)
    return train.run(filled, out, _threshold)


def _threshold(cases: CaseSet, folds: Sequence[Fold]) -> dict[str, Any]:
    def load(case_id: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        (case,) = cases.select([case_id])
        image = case.read_images()[0]
        return image.data, cases.read_label(case).data, image.affine

    found = threshold_baseline(load, folds)
    return {"what": found["what"], "dice": found["dice"]}
