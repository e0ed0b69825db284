"""Networks that are small enough for tests, with nothing in them that hides a mistake."""

from __future__ import annotations

from typing import Any

from torch import nn

from attention.dual_position_channel import ChannelAttention, PositionAttention
from tasks.meningioma.networks.daunet import DAUNet
from tasks.meningioma.networks.volume import VolumeNetwork

SMALL = (4, 6, 8)
"""Filters of three levels."""


def dagunet(**options: Any) -> VolumeNetwork:
    """The guided DAUNet."""
    return DAUNet(guided=True, **options)


def varied(network: nn.Module) -> nn.Module:
    """Nothing left at a value that hides a mistake: statistics, scales and shifts of their own, gammas of 1."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, PositionAttention | ChannelAttention):
            nn.init.ones_(module.gamma)
    return network
