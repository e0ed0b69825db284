"""The demo as a run: make slides, prepare them, cross-validate, and score the heat maps against the planted regions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tasks.common.runs import open_run
from tasks.wsi_mil import prepare, train
from tasks.wsi_mil.data import load_cohort, make_cache
from tasks.wsi_mil.demo import make_cohort

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """From nothing to ``report.html``; slides and features are kept in the cache folder for the next time."""
    settings = cfg.data.demo
    if cfg.dry_run:
        log.info("would make %d slides, prepare them with %s, and train", settings.slides, cfg.backbone.name)
        return {}
    with open_run(cfg, out) as current:
        folder = None if settings.folder is None else Path(settings.folder)
        cohort = make_cohort(folder, num_slides=settings.slides, seed=settings.seed)
        prepared = cohort.slides.parent / "prepared" / f"{cfg.backbone.name.replace('/', '_').replace(':', '_')}"
        filled = OmegaConf.merge(
            cfg,
            {
                "out": str(prepared),
                "data": {
                    "slides": str(cohort.slides),
                    "features": str(prepared),
                    "labels": str(cohort.labels),
                    "masks": str(cohort.masks),
                },
            },
        )
        assert isinstance(filled, DictConfig)
        prepare.run(filled)
        bags = load_cohort(filled.data)
        folds = train.plan_folds(bags, filled)
        return train.cross_validate(bags, folds, filled, current, make_cache(bags.cases, filled.data.cache))
