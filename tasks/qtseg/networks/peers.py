"""MONAI's 2-D networks as they are, for images of any size: UNet, AttentionUnet, SwinUNETR, SegResNet, FlexibleUNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.errors import InputError


class Padded(nn.Module):
    """A network that takes multiples of ``divisor``, for images of any size: padded with zeros, its logits cut.

    Args:
        network: images (B, C, H, W) to logits (B, K, H, W).
        divisor: of H and W.
    """

    def __init__(self, network: nn.Module, divisor: int) -> None:
        super().__init__()
        self.network = network
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        below, right = (-n % self.divisor for n in x.shape[2:])
        padded = F.pad(x, (0, right, 0, below)) if below or right else x
        return self.network(padded)[..., : x.shape[2], : x.shape[3]]


def monai_unet(
    in_channels: int, classes: int, channels: Sequence[int] = (32, 64, 128, 256, 512), num_res_units: int = 2
) -> nn.Module:
    """MONAI's residual U-Net (Kerfoot et al. 2019)."""
    from monai.networks.nets.unet import UNet

    network = _made("monai_unet", UNet, in_channels, classes, channels=tuple(channels), num_res_units=num_res_units)
    return Padded(network, 2 ** (len(channels) - 1))


def attention_unet(in_channels: int, classes: int, channels: Sequence[int] = (64, 128, 256, 512, 1024)) -> nn.Module:
    """Attention U-Net (Oktay et al. 2018)."""
    from monai.networks.nets.attentionunet import AttentionUnet

    return Padded(
        _made("attention_unet", AttentionUnet, in_channels, classes, channels=tuple(channels)),
        2 ** (len(channels) - 1),
    )


def swin_unetr(in_channels: int, classes: int, feature_size: int = 24, use_v2: bool = False) -> nn.Module:
    """Swin UNETR (Hatamizadeh et al. 2022)."""
    from monai.networks.nets.swin_unetr import SwinUNETR

    return Padded(_made("swin_unetr", SwinUNETR, in_channels, classes, feature_size=feature_size, use_v2=use_v2), 32)


def segresnet(
    in_channels: int, classes: int, init_filters: int = 16, blocks_down: Sequence[int] = (1, 2, 2, 4)
) -> nn.Module:
    """SegResNet without its auto-encoder (Myronenko 2018)."""
    from monai.networks.nets.segresnet import SegResNet

    blocks = {"blocks_down": tuple(blocks_down), "blocks_up": (1,) * (len(blocks_down) - 1)}
    network = _made("segresnet", SegResNet, in_channels, classes, init_filters=init_filters, **blocks)
    return Padded(network, 2 ** (len(blocks_down) - 1))


def flexible_unet(
    in_channels: int,
    classes: int,
    backbone: Mapping[str, Any],
    decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
) -> nn.Module:
    """FlexibleUNet around any backbone; ``backbone`` holds arguments of :func:`backbones.create`."""
    from monai.networks.nets.flexible_unet import FlexibleUNet

    from backbones.monai_adapter import register

    given = dict(backbone)
    pretrained = bool(given.pop("pretrained", False))
    given.pop("in_chans", None)
    name = register(given.pop("name"), **given)
    network = FlexibleUNet(
        in_channels, classes, name, pretrained=pretrained, decoder_channels=tuple(decoder_channels), spatial_dims=2
    )
    return Padded(network, 32)


def _made(name: str, cls: type[nn.Module], in_channels: int, classes: int, **params: Any) -> nn.Module:
    """MONAI's network, its refusals in one sentence."""
    if "channels" in params:
        params["strides"] = (2,) * (len(params["channels"]) - 1)
    try:
        return cls(spatial_dims=2, in_channels=in_channels, out_channels=classes, **params)
    except (ValueError, TypeError, AssertionError, IndexError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        told = ", ".join(f"{key}={value}" for key, value in params.items())
        raise InputError(f"decoder '{name}' cannot be built with {told} ({reason}).") from error
