"""DaViT's channel attention in both versions, and its two blocks."""

from __future__ import annotations

from torch import Tensor

import attention
from attention.dual_window_channel import DualBlock, DualWindowChannelAttention
from attention.layout import to_channels_first, to_channels_last
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


@adapter("attn_davit_channel", "attn_davit_channel_v2")
def channel(case: Case) -> dict[str, Tensor]:
    module = attention.create(
        "dual_window_channel",
        dim=case.config["dim"],
        num_heads=case.config["num_heads"],
        part="channel",
        version=2 if case.config.get("dynamic_scale") else 1,
    )
    assert isinstance(module, DualWindowChannelAttention) and module.channel is not None
    return run_module(case, module.channel)


@adapter("attn_davit_spatial_block_odd", "attn_davit_channel_block")
def block(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = DualBlock(
        config["dim"],
        config["num_heads"],
        "window" if "window_size" in config else "channel",
        window_size=config.get("window_size", 7),
        mlp_ratio=config["mlp_ratio"],
    )
    return run_module(case, module, before=to_channels_last, after=to_channels_first)
