"""One image to one mask: the same steps for test images, evaluation and new images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from tasks.common.segmentation.checkpoint import Segmenter, inference_of
from tasks.common.segmentation.inference import Inference, classes_of, drop_small
from tasks.qtseg.model import window_of
from tasks.qtseg.preprocessing import Prepared, Preprocessing

Mask = NDArray[np.uint8]


@dataclass(frozen=True)
class Cut:
    """From probabilities to a mask.

    Attributes:
        cutoff: probability from which on a pixel belongs to a structure; None: the likeliest class.
        smallest: pixels; components below are dropped.
    """

    cutoff: float | None = None
    smallest: float = 0

    @classmethod
    def of(cls, settings: DictConfig, searched: float | None) -> Cut:
        """From the section ``inference``, with the cut-off that the validation images chose."""
        chosen = {"search": searched, "argmax": None}.get(settings.cutoff, settings.cutoff)
        return cls(None if chosen is None else float(chosen), float(settings.smallest))

    def mask(self, probabilities: NDArray[Any]) -> Mask:
        """Classes (H, W) of probabilities (K, H, W)."""
        return drop_small(classes_of(probabilities, self.cutoff), self.smallest).astype(np.uint8, copy=False)


@dataclass(frozen=True)
class Segmented:
    """What a network says of one image.

    Attributes:
        prepared: the image as the network saw it.
        seen: probabilities (K, h, w) at that size, on the CPU.
    """

    prepared: Prepared
    seen: Tensor

    def probabilities(self) -> NDArray[np.float32]:
        """(K, H, W) at the image's own size."""
        return np.asarray(self.prepared.restore(self.seen).numpy(), np.float32)


def segment(segmenter: Segmenter, preprocessing: Preprocessing, image: NDArray[Any], how: Inference) -> Segmented:
    """Run the networks on an image (H, W, 1 or 3) as it is in its file."""
    prepared = preprocessing.prepare(image)
    with torch.inference_mode():
        return Segmented(prepared, segmenter.probabilities(prepared.tensor, how))


def how_to_infer(segmenter: Segmenter, settings: DictConfig) -> Inference:
    """The segmenter's inference with the settings of the section ``inference``.

    Raises:
        InputError: a setting cannot be used with this segmenter.
    """
    how = inference_of(segmenter, settings)
    how.flipped_axes(2)
    if settings.tile is None:
        return how
    window = window_of(settings, Preprocessing.from_dict(segmenter.description.preparation))
    return replace(how, patch_size=None if window is None else tuple(window))
