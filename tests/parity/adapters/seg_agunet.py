"""AGUNet whole, and its up-convolution, which DAUNet has too. The gate has an adapter of its own."""

from __future__ import annotations

import torch
from torch import Tensor

import attention
from tasks.meningioma.networks.agunet import AGUNet
from tasks.meningioma.networks.blocks import UpConv
from tests.parity.harness import Case, adapter


@adapter("seg_agunet_full", "seg_agunet_plain_*")
def agunet(case: Case) -> dict[str, Tensor]:
    config = case.config
    network = AGUNet(
        config["in_channels"],
        config["classes"],
        config["filters"],
        input_pyramid=config["input_pyramid"],
        deep_supervision=config["deep_supervision"],
    )
    return probabilities(network, case)


@adapter("seg_agunet_upconv_*", "seg_daunet_upconv_*")
def up_convolution(case: Case) -> dict[str, Tensor]:
    layer = UpConv(case.config["in_ch"], case.config["out_ch"], case.config["stride"])
    layer.load_state_dict({key.removeprefix("conv."): value for key, value in case.state.items()})
    return {"output.out": layer(case.inputs["x"])}


def probabilities(network: torch.nn.Module, case: Case) -> dict[str, Tensor]:
    """The softmax of every level by the names of the cases."""
    attention.load_official(network, case.state).eval()
    levels = network.forward_levels(case.inputs["x"])
    return {f"output.p{i}": level.softmax(1) for i, level in enumerate(levels)}
