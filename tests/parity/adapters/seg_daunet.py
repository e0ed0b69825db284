"""DAUNet whole, plain and guided. Its position and channel attention have adapters of their own."""

from __future__ import annotations

from torch import Tensor

from tasks.meningioma.networks.daunet import DAUNet
from tests.parity.adapters.seg_agunet import probabilities
from tests.parity.harness import Case, adapter


@adapter("seg_daunet_full", "seg_daunet_guided")
def daunet(case: Case) -> dict[str, Tensor]:
    config = case.config
    network = DAUNet(
        config["in_channels"],
        config["classes"],
        config["filters"],
        input_pyramid=config["input_pyramid"],
        deep_supervision=config["deep_supervision"],
        guided=config["attention_guiding"],
    )
    return probabilities(network, case)
