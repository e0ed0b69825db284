"""The published whole-volume preparation of meningioma volumes and its way back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tasks.common.volumes.geometry import resample
from tasks.common.volumes.volume import Volume
from tasks.meningioma.intensities import normalise
from tasks.meningioma.preparation import WholeVolume
from tests.parity.harness import Case, adapter

NAMES = {"min-max": "minmax", "zeromean": "zscore"}


@adapter("seg_mri_preprocess*")
def whole_volume(case: Case) -> Mapping[str, Tensor]:
    config = case.config
    volume = Volume(case.inputs["volume"].numpy(), case.inputs["affine"].double().numpy(), Path("input"))
    recipe = WholeVolume(
        size=tuple(config["new_size"]),
        spacing=tuple(config["output_spacing"]),
        percentiles=tuple(config["clip_percentiles"]),
        normalise=NAMES[config["normalization"]],
        back="corner",
    )
    prepared = recipe.prepare([volume])
    way = prepared.way
    resampled = resample(volume.data, way.native, way.working)
    normalised = resampled.copy()
    normalise(normalised, recipe.normalise, recipe.percentiles)
    small = case.expected["output.prob_small"]
    native = prepared.restore(torch.stack([1 - small, small]))[1]
    return {
        "output.resampled": torch.from_numpy(resampled),
        "output.resampled_affine": torch.from_numpy(way.working.affine),
        "output.normalised": torch.from_numpy(normalised),
        "output.bbox": torch.tensor([*way.low, *np.add(way.low, way.box)]),
        "output.network_input": prepared.image[0],
        "output.prob_small": small,
        "output.prob_native": torch.from_numpy(native),
    }
