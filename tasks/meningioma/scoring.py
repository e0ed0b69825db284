"""What is measured of one segmented case: overlap, surfaces, objects and volumes, at the scan's own voxels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.common.segmentation.objectwise import match_objects
from tasks.common.segmentation.overlap import overlap_metrics, voxel_volume_ml
from tasks.common.segmentation.surface import surface_metrics

OVERLAP = ("dice", "iou", "sensitivity", "precision", "specificity")


@dataclass(frozen=True)
class Scoring:
    """Limits of the metrics.

    Attributes:
        limit_ml: small and large structures are reported apart.
        overlap: Dice above which a patient counts as found.
        found: Dice above which two components are one object.
        object_voxels: components of fewer voxels count on neither side.
        tolerance_mm: of the surface Dice.
    """

    limit_ml: float = 3.0
    overlap: float = 0.0
    found: float = 0.1
    object_voxels: int = 50
    tolerance_mm: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("overlap", self.overlap), ("found", self.found)):
            if not 0 <= value < 1:
                raise InputError(f"evaluation.{name}={value} must be a Dice of 0 or more and less than 1.")
        for name, value in (("limit_ml", self.limit_ml), ("object_voxels", self.object_voxels)):
            if value < 0:
                raise InputError(f"evaluation.{name}={value} must be 0 or more.")
        if not self.tolerance_mm > 0:
            raise InputError(f"evaluation.tolerance_mm={self.tolerance_mm} must be more than 0 mm.")

    @classmethod
    def of(cls, settings: DictConfig) -> Scoring:
        """From the section ``evaluation``.

        Raises:
            InputError: a limit is not possible.
        """
        names = ("limit_ml", "overlap", "found", "object_voxels", "tolerance_mm")
        return cls(**{name: settings[name] for name in names})


def score_case(
    predicted: NDArray[Any],
    reference: NDArray[Any],
    affine: NDArray[np.float64],
    classes: tuple[str, ...],
    how: Scoring,
) -> dict[str, float]:
    """Metrics of one case; NaN where one is undefined.

    Those without a class's name are of all structures together. A Dice is undefined where neither side has anything.

    Args:
        predicted, reference: (X, Y, Z) classes.
        affine: (4, 4), of both.
        classes: names, the background first.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    voxel_ml = voxel_volume_ml(affine)
    ours, theirs = predicted > 0, reference > 0
    found = overlap_metrics(ours[None], theirs[None], empty="nan", voxel_ml=voxel_ml)
    row = {name: float(found[name][0, 0]) for name in (*OVERLAP, "reference_ml", "predicted_ml")}
    surfaces = surface_metrics(ours, theirs, spacing.tolist(), (how.tolerance_mm,))
    row |= {name: surfaces[name] for name in surfaces if name.startswith("nsd_") or name in ("hd95", "assd")}
    objects = match_objects(ours, theirs, how.object_voxels, least_dice=how.found)
    row |= {
        "reference_objects": float(len(objects.reference_sizes)),
        "predicted_objects": float(len(objects.predicted_sizes)),
        "found_objects": float(len(objects.pairs)),
        "object_dice": objects.metrics()["object_dice"],
    }
    large = objects.reference_sizes * voxel_ml > how.limit_ml
    row |= {"large_objects": float(large.sum()), "found_large_objects": float((large & objects.found).sum())}
    if len(classes) > 2:
        each = overlap_metrics(predicted[None], reference[None], empty="nan", num_classes=len(classes))
        row |= {f"dice/{name}": float(each["dice"][0, k]) for k, name in enumerate(classes[1:])}
    return row
