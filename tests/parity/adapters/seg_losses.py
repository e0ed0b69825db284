"""The Dice losses of AGUNet: what its authors shipped, and what their paper states, which is what trains here."""

from __future__ import annotations

from torch import Tensor

from tasks.common.segmentation.losses import foreground_dice
from tests.parity.harness import Case, adapter


@adapter("seg_agunet_dice_losses")
def dice(case: Case) -> dict[str, Tensor]:
    def shipped(probabilities: Tensor, target: Tensor) -> Tensor:
        axes = [0, *range(2, probabilities.ndim)]
        overlap = (probabilities * target).sum(axes)
        both = probabilities.square().sum(axes) + target.square().sum(axes)
        total = ((2 * overlap + 1) / (both + 1)).sum() / (probabilities.shape[1] - 1)
        return (1 - total).clamp(0, 1 - case.config["eps"])

    outputs = {}
    for suffix, probabilities in (("", case.inputs["prob"]), ("_bad", case.inputs["bad_prob"])):
        target = case.inputs["target"]
        outputs[f"output.foreground{suffix}"] = foreground_dice(probabilities, target, case.config["smooth"])
        outputs[f"output.shipped{suffix}"] = shipped(probabilities, target)
    return outputs
