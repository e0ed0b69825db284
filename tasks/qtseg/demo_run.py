"""The demo as a run: paint the pictures, then train on them as on any others, beside a threshold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tasks.common.crossval import Fold
from tasks.qtseg import train
from tasks.qtseg.data import ImageSet2D
from tasks.qtseg.demo import class_name, make_images
from tasks.qtseg.demo.baseline import threshold_baseline

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """From nothing to ``report.html``; the pictures are kept in the cache folder for the next time."""
    settings = cfg.data.shapes2d
    if cfg.dry_run:
        log.info("would paint %d pictures and train %s on them", settings.images, cfg.decoder.name)
        return {}
    folder = None if settings.folder is None else Path(settings.folder)
    table = make_images(folder, settings.kind, settings.images, settings.side, settings.seed)
    labels = cfg.data.labels or {class_name(settings.kind): 255}
    filled = OmegaConf.merge(cfg, {"data": {"path": str(table), "labels": labels}})
    assert isinstance(filled, DictConfig)
    return train.run(filled, out, _threshold)


def _threshold(images: ImageSet2D, folds: Sequence[Fold]) -> dict[str, Any]:
    found = threshold_baseline(images, folds)
    return {name: found[name] for name in ("what", "dice", "rules")}
