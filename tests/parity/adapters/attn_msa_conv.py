"""MSA-Conv: the released layer with its stride and channels, and as a mixer where the map keeps its shape."""

from __future__ import annotations

from torch import Tensor, nn

import attention
from attention.layout import to_channels_first, to_channels_last
from attention.msa_conv import MSAConv2d
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


@adapter("attn_msaconv", "bb_msaconv_k3")
def layer(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = MSAConv2d(
        config["input_channel"],
        config["output_channel"],
        config["kernel_size"],
        config.get("stride", 1),
        config.get("padding"),
        config.get("dilation", 1),
        bias="mlp.bias" in case.state,
    )
    return _run(case, module, "")


@adapter("attn_msaconv_dil")
def mixer(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = attention.create(
        "msa_conv",
        dim=config["input_channel"],
        kernel_size=config["kernel_size"],
        dilation=config["dilation"],
        bias=config["bias"],
    )
    return _run(case, module, "conv.")


def _run(case: Case, module: nn.Module, prefix: str) -> dict[str, Tensor]:
    names = {f"{prefix}qkv.{kind}": f"qkv_conv.{kind}" for kind in ("weight", "bias")}
    names |= {f"{prefix}mlp.{kind}": f"mlp.{kind}" for kind in ("weight", "bias")}
    return run_module(case, module, names=names, before=to_channels_last, after=to_channels_first)
