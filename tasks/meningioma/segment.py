"""One scan to one mask: the same steps for test cases, evaluation and new scans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from tasks.common.segmentation.checkpoint import Segmenter
from tasks.common.segmentation.inference import Inference, drop_small
from tasks.common.segmentation.overlap import voxel_volume_ml
from tasks.meningioma.preparation import Prepared


@dataclass(frozen=True)
class Cut:
    """From probabilities to a mask.

    Attributes:
        cutoff: probability of the structures together from which on a voxel belongs to one; None: the likeliest class.
        first: cut before the resampling to native space.
        smallest_ml: components below are dropped.
    """

    cutoff: float | None
    first: bool = False
    smallest_ml: float = 0.0

    @classmethod
    def of(cls, settings: DictConfig, searched: float | None) -> Cut:
        """From the section ``inference``, with the cut-off that the validation cases chose."""
        chosen = {"search": searched, "argmax": None}.get(settings.cutoff, settings.cutoff)
        return cls(None if chosen is None else float(chosen), bool(settings.cut_first), float(settings.smallest_ml))


def probabilities_of(
    segmenter: Segmenter, prepared: Prepared, how: Inference, on_step: Callable[[], None] | None = None
) -> Tensor:
    """Probabilities (K, D, H, W) as the network sees the scan, on the CPU."""
    with torch.inference_mode():
        return segmenter.probabilities(prepared.image, how, on_step)


def mask_of(prepared: Prepared, probabilities: Tensor, affine: NDArray[Any], cut: Cut) -> NDArray[np.uint8]:
    """Classes (X, Y, Z) at the scan's own voxels."""
    mask = prepared.mask(probabilities, cut.cutoff, cut.first)
    smallest = cut.smallest_ml / voxel_volume_ml(affine)
    return drop_small(mask, smallest).astype(np.uint8, copy=False)
