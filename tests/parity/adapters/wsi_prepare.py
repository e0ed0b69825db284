"""Tissue outlines and tile grids of CLAM and TRIDENT."""

from collections.abc import Mapping

import cv2
import numpy as np
import torch
from torch import Tensor

from tasks.common.contours import rasterise
from tasks.wsi_mil.peers import clam_grid, trident_plan
from tasks.wsi_mil.tissue import Preset, clam_contours
from tests.parity.harness import Case, adapter


@adapter("wsi_clam_seg_tile*")
def clam_segmentation_and_tiling(case: Case) -> Mapping[str, Tensor]:
    image = case.inputs["image"].numpy().astype(np.uint8)
    config, seg, areas = case.config, case.config["seg_params"], case.config["filter_params"]
    down = config["level_downsamples"][-1]
    preset = Preset(
        seg["sthresh"], seg["mthresh"], seg["close"], areas["a_t"], areas["a_h"], areas["max_n_holes"], seg["use_otsu"]
    )
    contours, _, _ = clam_contours(image, (down, down), preset)
    size = image.shape[1] * down, image.shape[0] * down
    coords = [
        clam_grid(
            contour,
            size,
            config["patch_size"],
            config["step_size"],
            config["level_downsamples"][config["patch_level"]],
            config["contour_fn"],
            config["use_padding"],
        )
        for contour in contours
    ]
    return {
        "output.coords": torch.from_numpy(np.concatenate(coords)),
        "output.contour_id": torch.cat([torch.full((len(c),), i) for i, c in enumerate(coords)]),
        "output.tissue_mask": torch.from_numpy(rasterise(contours, image.shape[:2], (down, down))),
        "output.contour_bbox": torch.tensor([cv2.boundingRect(c.outline) for c in contours]),
        "output.contour_area": torch.tensor([cv2.contourArea(c.outline) for c in contours]),
        "output.holes_per_contour": torch.tensor([len(c.holes) for c in contours]),
    }


@adapter("wsi_trident_grid")
def trident_grid(case: Case) -> Mapping[str, Tensor]:
    plans, checks = [], []
    for (width, height, mpp, pyramid), (magnification, size, overlap) in zip(
        case.inputs["slides"].tolist(), case.inputs["request"].tolist(), strict=True
    ):
        levels = case.config["pyramids"][str(int(pyramid))]
        plan = trident_plan((int(width), int(height)), mpp, levels, magnification, int(size), int(overlap))
        coords = plan.coords()
        plans.append(
            [
                plan.magnification,
                plan.size,
                plan.overlap,
                plan.level,
                plan.level_size,
                plan.columns,
                plan.rows,
                len(coords),
            ]
        )
        checks.append([*coords[-1], *coords[min(plan.columns, len(coords) - 1)]])
    return {"output.plan": torch.tensor(plans), "output.coords_check": torch.tensor(np.array(checks))}
