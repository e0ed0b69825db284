"""Segmentation metrics against the Raidionics validation library, the surface-distance algorithm and QTSeg."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tasks.common.segmentation.objectwise import match_objects
from tasks.common.segmentation.overlap import overlap_metrics
from tasks.common.segmentation.patientwise import RELEASED_SMOOTHING, patientwise_metrics
from tasks.common.segmentation.surface import surface_metrics
from tests.parity.harness import Case, adapter

RATES = ("recall", "precision", "specificity", "f1", "accuracy", "balanced_accuracy")


@adapter("seg_metrics_patientwise")
def patientwise(case: Case) -> dict[str, Tensor]:
    columns = [case.inputs[name].double().numpy() for name in ("dice", "gt_ml", "det_ml")]
    got = {}
    for convention in ("all", "positive", "tp"):
        found = patientwise_metrics(
            *columns, convention, case.config["volume_ml"], case.config["overlap"], RELEASED_SMOOTHING
        )
        got[f"output.{convention}"] = torch.tensor([found[name] for name in RATES])
    return got | {f"output.{theirs}": torch.tensor(found[ours]) for theirs, ours in
                  (("dice_all", "dice"), ("dice_tp", "dice_tp"))}  # fmt: skip


@adapter("seg_metrics_objectwise")
def objectwise(case: Case) -> dict[str, Tensor]:
    reference, predicted = case.inputs["gt"].numpy(), case.inputs["pred"].numpy()
    found = match_objects(predicted, reference, case.config["tiny_objects_removal_threshold"])
    values = found.metrics()
    # The released F1 of a pair is that of its recall and precision, which is its Dice.
    pairs = [values[f"object_{name}{end}"] for name in ("dice", "recall", "precision", "dice") for end in ("", "_sd")]
    voxels = overlap_metrics(predicted[None], reference[None], empty="raidionics")
    return {
        "output.objectwise": torch.tensor([values["recall"], values["precision"], values["f1"], *pairs]),
        "output.pixelwise": torch.tensor([voxels[n].item() for n in ("dice", "sensitivity", "precision", "dice")]),
    }


@adapter("seg_metrics_surface", "seg_metrics_surface_*")
def surface(case: Case) -> dict[str, Tensor]:
    reference, predicted = case.inputs["gt"].numpy(), case.inputs["pred"].numpy()
    found = surface_metrics(predicted, reference, case.config["spacing"], (1, 2))
    found["asd_gt_to_pred"], found["asd_pred_to_gt"] = (
        found["asd_reference_to_predicted"],
        found["asd_predicted_to_reference"],
    )
    found["dice"] = overlap_metrics(predicted[None], reference[None], empty="nan")["dice"].item()
    return {f"output.{name}": torch.tensor(value) for name, value in found.items()}


@adapter("seg_qtseg_metrics")
def qtseg(case: Case) -> dict[str, Tensor]:
    got = {}
    for prefix, logits, target in (("", "logits", "y"), ("multi_", "logits3", "y3")):
        predicted = case.inputs[logits].argmax(1)
        classes = case.inputs[logits].shape[1]
        found = overlap_metrics(predicted, case.inputs[target], empty="qtseg", num_classes=classes)
        for theirs, ours in (("dice", "dice"), ("iou", "iou"), ("mae", "mae"), ("acc", "accuracy")):
            got[f"output.{prefix}{theirs}"] = torch.tensor(100 * np.mean(found[ours]))
            if not prefix:
                got[f"output.per_{theirs}"] = torch.tensor(found[ours][:, 0])
    return got
