"""CLAM's heat map: percentiles, overlapping tiles averaged, jet at alpha 0.4 over the slide."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tasks.wsi_mil.heatmap import normalise, overlay, rasterise
from tests.parity.harness import Case, adapter


@adapter("wsi_clam_heatmap")
def clam_heatmap(case: Case) -> dict[str, Tensor]:
    config = case.config
    downsample = config["level_downsamples"][config["vis_level"]]
    ranks = normalise(case.inputs["scores"].numpy(), "rank")
    size = tuple(config["level0"])
    heat = rasterise(ranks, case.inputs["coords"].numpy(), config["patch_size"][0], size, downsample, edges="ceil")
    background = np.full((*heat.shape, 3), 200, dtype=np.uint8)
    image = overlay(background, heat, config["cmap"], config["alpha"])
    return {
        "output.percentiles": torch.from_numpy(ranks * 100).float(),
        "output.image": torch.from_numpy(image).long(),
    }
