"""What is measured of one segmented image: overlap, outlines, ranking of the pixels, centre lines of vessels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from kernels.errors import InputError, unknown_name
from tasks.common.segmentation.overlap import EmptyRule, class_counts, confusion_matrices, overlap_ratios
from tasks.common.segmentation.ranking import centreline_dice
from tasks.common.segmentation.ranking_counts import RankingCounts, count_ranking
from tasks.common.segmentation.surface import surface_metrics

OVERLAP = ("dice", "iou", "sensitivity", "specificity", "precision", "accuracy")
RELEASED = ("dice", "iou", "accuracy", "mae")
EMPTY: dict[str, EmptyRule] = {"leave_out": "nan", "one": "one", "zero": "zero"}
PROTOCOLS = ("honest", "released")

RULES = {
    "nan": "where neither mask has a pixel, Dice and IoU are undefined and left out of the means; where one has, both "
    "are 0",
    "one": "Dice and IoU are 1 where neither mask has a pixel and 0 where one of them has",
    "zero": "Dice and IoU are 0 where a mask has no pixel, also where neither has",
    "qtseg": "a count of 0 true positives is taken as 1, so that an image with an empty mask never scores 0 and one "
    "with two empty masks scores 1",
}


@dataclass(frozen=True)
class Scoring:
    """How images are scored.

    Attributes:
        empty: what Dice and IoU are for empty masks.
        vessels: also the Dice of centre lines.
        tolerance: of the surface Dice, pixels.
        released: as QTSeg's code does: at the network's size, padding included, overlap alone.
    """

    empty: EmptyRule = "nan"
    vessels: bool = False
    tolerance: float = 2.0
    released: bool = False

    @classmethod
    def of(cls, cfg: DictConfig, classes: Sequence[str]) -> Scoring:
        """From ``evaluation`` and ``protocol``.

        Raises:
            InputError: a setting is not possible.
        """
        settings = cfg.evaluation
        if cfg.protocol not in PROTOCOLS:
            raise unknown_name("protocol", str(cfg.protocol), PROTOCOLS)
        if settings.empty not in EMPTY:
            raise unknown_name("evaluation.empty", str(settings.empty), EMPTY)
        if settings.vessels not in (True, False, "auto"):
            raise unknown_name("evaluation.vessels", str(settings.vessels), ("auto", "true", "false"))
        if not settings.tolerance > 0:
            raise InputError(f"evaluation.tolerance={settings.tolerance} must be more than 0 pixels.")
        named = any("vessel" in name.lower() for name in classes[1:])
        vessels = named if settings.vessels == "auto" else bool(settings.vessels)
        if cfg.protocol == "released":
            return cls("qtseg", False, float(settings.tolerance), released=True)
        return cls(EMPTY[settings.empty], vessels, float(settings.tolerance))

    def metrics(self, classes: Sequence[str]) -> list[str]:
        """Names of the columns that are averaged over images, in the order of a table."""
        if self.released:
            return list(RELEASED)
        lines = ["cldice", "topology_precision", "topology_sensitivity"] if self.vessels else []
        each = [f"{kind}/{name}" for kind in ("dice", "iou") for name in classes[1:]] if len(classes) > 2 else []
        return [*OVERLAP, "hd95_px", f"nsd_{self.tolerance:g}px", "assd_px", "auc", *lines, *each]


def score(
    predicted: NDArray[Any],
    reference: NDArray[Any],
    region: NDArray[Any] | None,
    classes: Sequence[str],
    how: Scoring,
    ranking: RankingCounts | None = None,
) -> dict[str, float]:
    """Metrics of one image; NaN where one is undefined.

    Those without a class's name are of all structures together. ``tp``, ``fp``, ``fn`` and ``tn`` are pixels.

    Args:
        predicted, reference: (H, W) classes.
        region: (H, W), 0 where nothing counts, such as outside the field of view.
        classes: names, the background first.
        ranking: of the pixels by their probability of being no background, where there are probabilities.
    """
    ours, theirs = predicted > 0, reference > 0
    counts = class_counts(confusion_matrices(ours[None], theirs[None], 2, region))
    found = overlap_ratios(counts, how.empty)
    row = {name: float(found[name][0, 1]) for name in (RELEASED if how.released else OVERLAP)}
    row |= {name: float(getattr(counts, name)[0, 1]) for name in ("tp", "fp", "fn", "tn")}
    if how.released:
        return row
    if region is not None:
        ours, theirs = ours & (region != 0), theirs & (region != 0)
    surfaces = surface_metrics(ours, theirs, (1.0, 1.0), (how.tolerance,))
    row |= {"hd95_px": surfaces["hd95"], "assd_px": surfaces["assd"]}
    row[f"nsd_{how.tolerance:g}px"] = surfaces[f"nsd_{how.tolerance:g}mm"]  # of a spacing of one pixel
    if ranking is not None:
        row["auc"] = ranking.auc
    if how.vessels:
        row |= centreline_dice(predicted > 0, reference > 0, region)
    if len(classes) > 2:
        matrices = confusion_matrices(predicted[None], reference[None], len(classes), region)
        every = overlap_ratios(class_counts(matrices), how.empty)
        for kind in ("dice", "iou"):
            row |= {f"{kind}/{name}": float(every[kind][0, k]) for k, name in enumerate(classes) if k}
    return row


def ranked(probabilities: NDArray[Any], reference: NDArray[Any], region: NDArray[Any] | None) -> RankingCounts:
    """Pixels by the probability (K, H, W) of being no background, inside and outside the reference (H, W)."""
    foreground = probabilities[1] if len(probabilities) == 2 else np.clip(1 - probabilities[0], 0, 1)
    return count_ranking(np.clip(foreground, 0, 1), reference > 0, region)
