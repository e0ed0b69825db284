"""QTSeg's way of making images and masks ready."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tasks.qtseg.preprocessing import Preprocessing
from tests.parity.harness import Case, adapter

COLOURS = {None: "rgb", "RGB2YCrCb": "ycrcb"}


@adapter("seg_qtseg_preprocess*")
def prepare(case: Case) -> Mapping[str, Tensor]:
    size = int(case.config["img_size"])
    image = case.inputs["image"].numpy().astype(np.uint8)
    preprocessing = Preprocessing((size, size), colour=COLOURS[case.config["cvtColor"]])
    plain = Preprocessing((size, size)).canvas(image)
    height, width = plain.used
    return {
        "output.resized": torch.from_numpy(plain.image[:, :height, :width].transpose(1, 2, 0).copy()),
        "output.x": preprocessing.prepare(image).tensor,
        "output.mask": preprocessing.label((case.inputs["mask"] > 0).numpy().astype(np.uint8)),
    }
