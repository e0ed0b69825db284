"""QTSeg, whole and in parts, from the released code's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import attention
import backbones
from attention.dual_position_channel import ChannelAttention
from backbones.qtseg_encoder import checkpoint_filter_fn
from tasks.qtseg.networks.bridge import FeatureDistribution
from tasks.qtseg.networks.dual_mix import DualMixBlock, SpatialWeights
from tasks.qtseg.networks.mask_decoder import MaskDecoder
from tasks.qtseg.networks.qtseg import QTSeg
from tests.parity.harness import Case, adapter


@adapter("seg_qtseg_full*")
def full(case: Case) -> dict[str, Tensor]:
    config = case.config
    network = QTSeg(_encoder(config["n_channel"]), **_decoder(config)).eval()
    attention.load_official(network, case.state)
    x = case.inputs["x"].clone().requires_grad_()
    masks, features = network.features(x)
    torch.testing.assert_close(network(x), masks, rtol=1e-4, atol=1e-4)
    return {"output.masks": masks, "output.feat": features} | _gradients(case, x, masks, features)


@adapter("seg_qtseg_mask_decoder")
def mask_decoder(case: Case) -> dict[str, Tensor]:
    network = MaskDecoder(**_decoder(case.config)).eval()
    state = QTSeg.checkpoint_filter({f"mask_decoder.{key}": value for key, value in case.state.items()})
    network.load_state_dict(_under(state, "decoder."))
    levels = [case.inputs[name].clone().requires_grad_() for name in ("f8", "f16", "f32")]
    masks, features = network.features(levels)
    torch.testing.assert_close(network(levels), masks, rtol=1e-4, atol=1e-4)
    return {"output.masks": masks, "output.feat": features}


@adapter("seg_qtseg_mlfd")
def bridge(case: Case) -> dict[str, Tensor]:
    network = FeatureDistribution(case.config["n_channel"]).eval()
    state = {f"mlff.{key}": value for key, value in case.state.items()} | {"mask_decoder.": torch.empty(0)}
    network.load_state_dict(_under(QTSeg.checkpoint_filter(state), "bridge."))
    found = network([case.inputs[name] for name in ("f8", "f16", "f32")])
    return dict(zip(("output.o8", "output.o16", "output.o32"), found, strict=True))


@adapter("seg_qtseg_fpn_encoder")
def encoder(case: Case) -> dict[str, Tensor]:
    pyramid = _encoder(case.config["n_channel"]).eval()
    pyramid.model.load_state_dict(checkpoint_filter_fn(case.state, pyramid))  # type: ignore[union-attr]
    return dict(zip(("output.f8", "output.f16", "output.f32"), pyramid(case.inputs["x"]), strict=True))


@adapter("seg_qtseg_dual_mix_attention_block")
def dual_mix(case: Case) -> dict[str, Tensor]:
    config = case.config
    block = DualMixBlock(config["embedding_dim"], config["depth"], config["num_heads"], config["mlp_dim"]).eval()
    state = QTSeg.checkpoint_filter({f"mask_decoder.DMAB_s0.{key}": value for key, value in case.state.items()})
    block.load_state_dict(_under(state, "decoder.blocks.0."))
    image = case.inputs["image_embedding"].clone().requires_grad_()
    queries, keys = block(case.inputs["mask_token"], image.movedim(1, -1), case.inputs["image_pe"].movedim(1, -1))
    keys = keys.movedim(-1, 1)
    (gradient,) = torch.autograd.grad(queries.sum() + keys.sum(), image)
    return {"output.queries": queries, "output.keys": keys, "grad.input.image_embedding": gradient}


@adapter("seg_qtseg_channel_attention")
def channel_attention(case: Case) -> dict[str, Tensor]:
    module = attention.load_official(ChannelAttention(), case.state).eval()
    x = case.inputs["x"].clone().requires_grad_()
    out = module(x)
    return {"output.out": out, "grad.input.x": torch.autograd.grad(out.sum(), x)[0]}


@adapter("seg_qtseg_spatial_attention_k7")
def spatial_attention(case: Case) -> dict[str, Tensor]:
    module = SpatialWeights(case.config["kernel_size"])
    module.load_state_dict({key.replace("cv1.", "conv."): value for key, value in case.state.items()})
    x = case.inputs["x"].clone().requires_grad_()
    out = module(x.movedim(1, -1)).movedim(-1, 1)
    return {"output.out": out, "grad.input.x": torch.autograd.grad(out.sum(), x)[0]}


def _encoder(width: int) -> nn.Module:
    return backbones.create("qtseg_encoder", features_only=True, width=width)


def _decoder(config: Mapping) -> dict:
    return {
        "num_classes": config["num_classes"],
        "width": config["n_channel"],
        "depths": config["mask_depths"],
        "num_heads": config["mask_num_head"],
        "mlp_dim": config["mask_mlp_dim"],
    }


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _gradients(case: Case, x: Tensor, *outputs: Tensor) -> dict[str, Tensor]:
    wanted = [key for key in case.expected if key.startswith("grad.")]
    return {key: torch.autograd.grad(outputs[0].sum(), x, retain_graph=True)[0] for key in wanted}
