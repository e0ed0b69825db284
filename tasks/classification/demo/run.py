"""The demo as a run: make the images, then train on them as on any others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tasks.classification import train
from tasks.classification.demo import make_images

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """From nothing to ``report.html``; the images are kept in the cache folder for the next time."""
    settings = cfg.data.textures
    if cfg.dry_run:
        log.info("would make %d images and train %s on them", settings.images, cfg.backbone.name)
        return {}
    table = make_images(None if settings.folder is None else Path(settings.folder), settings.images, settings.seed)
    filled = OmegaConf.merge(cfg, {"data": {"path": str(table)}})
    assert isinstance(filled, DictConfig)
    return train.run(filled, out)
