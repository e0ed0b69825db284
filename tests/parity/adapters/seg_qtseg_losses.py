"""QTSeg's losses."""

from __future__ import annotations

from torch import Tensor

from tasks.qtseg.losses import QTSegLoss, binary_dice, categorical_dice, cross_entropy, focal
from tests.parity.harness import Case, adapter


@adapter("seg_qtseg_losses")
def losses(case: Case) -> dict[str, Tensor]:
    given = case.inputs
    return {
        "output.ce": cross_entropy(given["logits2"], given["y"]),
        "output.bce_1ch": cross_entropy(given["logits1"], given["y"]),
        "output.binary_dice_2ch": binary_dice(given["logits2"], given["y"]),
        "output.binary_dice_1ch": binary_dice(given["logits1"], given["y"]),
        "output.categorical_dice": categorical_dice(given["logits3"], given["y3"]),
        "output.focal_1ch": focal(given["logits1"], given["y"]),
        "output.total_default": QTSegLoss()(given["logits2"], given["y"]),
    }
