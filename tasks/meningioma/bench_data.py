"""Volumes handed to training per second, with each cache beside none."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from tasks.common.bench import BenchRow
from tasks.meningioma.augmentation import augmentation
from tasks.meningioma.data import load_cases
from tasks.meningioma.demo import make_heads
from tasks.meningioma.loading import Augment, measure_loading
from tasks.meningioma.preparation import Preparation

_CASES = 6


def rows() -> Iterator[BenchRow]:
    """Whole volumes at the published size, from made heads of 96 voxels a side."""
    table = make_heads(cases=_CASES, side=96)
    unset = ("labels", "image_names", "label_name", "channel", "patient_pattern")
    settings = OmegaConf.create({"path": str(table), "format": "auto", **dict.fromkeys(unset)})
    preparation = Preparation.from_config({"recipe": "whole"})
    with tempfile.TemporaryDirectory() as folder:
        rates = measure_loading(
            load_cases(settings).cases, preparation, Augment(None, augmentation("paper")), folder=Path(folder)
        )
    size = "128x128x144"
    yield BenchRow(f"volumes {size}, from memory", rates["memory"], rates["none"], "prepared each time", "volumes/s")
    yield BenchRow(f"volumes {size}, from disk", rates["disk"], rates["none"], "prepared each time", "volumes/s")
    augmented = rates["memory_augmented"]
    yield BenchRow(f"volumes {size}, augmented", augmented, rates["none"], "prepared each time", "volumes/s")
