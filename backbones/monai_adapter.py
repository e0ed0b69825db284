"""Every backbone as an encoder of MONAI's FlexibleUNet.

    from backbones.monai_adapter import register
    network = FlexibleUNet(in_channels=1, out_channels=2, backbone=register("convnext_tiny"))

MONAI is imported when one of the functions is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import backbones
from kernels.errors import InputError

STRIDES = (2, 4, 8, 16, 32)
"""Of the maps that FlexibleUNet's decoder takes; the first is added to backbones that have none."""


def encoder_class(name: str, **params: Any) -> type[nn.Module]:
    """An encoder class for MONAI around the backbone ``name``, built with ``params`` of :func:`backbones.create`.

    Images (B, in_channels, H, W) become five maps of strides 2 to 32, with floor(H / stride) rows and
    floor(W / stride) columns as MONAI's decoder wants them.

    Raises:
        InputError: MONAI is not installed, or the backbone has no maps of these strides; when the encoder is built,
            that the images are of three axes.
    """
    try:
        from monai.networks.blocks.encoder import BaseEncoder
    except ImportError as error:
        raise InputError("the encoder for FlexibleUNet needs MONAI; install it with: pip install monai") from error
    params = {"out_strides": STRIDES, **params}
    with torch.device("meta"):
        pyramid: Any = backbones.create(
            name, features_only=True, **{k: v for k, v in params.items() if k != "checkpoint"}
        )
    channels = pyramid.channels

    class Encoder(nn.Module, BaseEncoder):
        """The backbone as MONAI builds it."""

        def __init__(self, spatial_dims: int = 2, in_channels: int = 3, pretrained: bool = False) -> None:
            super().__init__()
            if spatial_dims != 2:
                raise InputError(f"backbone '{name}' takes images of two axes, not spatial_dims={spatial_dims}.")
            given = params | {"in_chans": in_channels}
            self.pyramid: Any = backbones.create(name, pretrained=pretrained, features_only=True, **given)

        def forward(self, x: Tensor) -> list[Tensor]:
            # The decoder doubles each map and adds a row or a column where that is too few; it takes none away.
            height, width = x.shape[-2:]
            maps = zip(self.pyramid(x), self.pyramid.strides, strict=True)
            return [y[..., : height // stride, : width // stride].contiguous() for y, stride in maps]

        @classmethod
        def get_encoder_parameters(cls) -> list[dict[str, Any]]:
            return [{"spatial_dims": 2, "in_channels": 3, "pretrained": False}]

        @classmethod
        def num_channels_per_output(cls) -> list[tuple[int, ...]]:
            return [channels]

        @classmethod
        def num_outputs(cls) -> list[int]:
            return [len(channels)]

        @classmethod
        def get_encoder_names(cls) -> list[str]:
            return [name]

    return Encoder


def register(name: str, **params: Any) -> str:
    """Make the backbone ``name`` known to FlexibleUNet, and return the name to give as its ``backbone``.

    Raises:
        InputError: as :func:`encoder_class`.
    """
    encoder = encoder_class(name, **params)
    from monai.networks.nets.flexible_unet import FLEXUNET_BACKBONE

    FLEXUNET_BACKBONE.register_class(encoder)
    return name
