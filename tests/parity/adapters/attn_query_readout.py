"""QTSeg's dual-mix attention block, composed of query readouts: its every attention is one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import attention
from tests.parity.harness import Case, adapter


@adapter("seg_qtseg_dual_mix_attention_block")
def dual_mix(case: Case) -> dict[str, Tensor]:
    image = case.inputs["image_embedding"].clone().requires_grad_()
    grid = image.shape[2:]
    position = case.inputs["image_pe"].flatten(2).transpose(1, 2)
    first = case.inputs["mask_token"]
    tokens, features = first, image.flatten(2).transpose(1, 2)
    for layer in range(case.config["depth"]):
        state = _under(case.state, f"layers.{layer}.")
        x = features + position
        maps = x.transpose(1, 2).unflatten(2, grid)
        statistics = torch.stack([maps.mean(1), maps.amax(1)], 1)
        gate = F.conv2d(statistics, state["dm_attention.spatial_attention.cv1.weight"], padding=3).sigmoid()
        by_place = x * gate.flatten(2).transpose(1, 2) + x
        energy = x.transpose(1, 2) @ x
        shares = (energy.amax(-1, keepdim=True) - energy).softmax(-1)
        by_channel = state["dm_attention.channel_attention.gamma"] * (x @ shares.transpose(1, 2)) + x
        mixed = _reader(case, _under(state, "dm_attention.spatial_token_mix_attention."))(tokens, by_place)
        mixed = mixed + _reader(case, _under(state, "dm_attention.channel_token_mix_attention."))(tokens, by_channel)
        mixed = _norm(mixed + tokens, state, "dm_attention.token_layernorm")
        hidden = F.gelu(F.linear(mixed, state["token_mlp.lin1.weight"], state["token_mlp.lin1.bias"]))
        hidden = F.linear(hidden, state["token_mlp.lin2.weight"], state["token_mlp.lin2.bias"])
        tokens = _norm(hidden, state, "token_layernorm") + tokens
        features = _reader(case, _under(state, "feature_mix."))(by_place + by_channel + position, mixed) + features
    last = attention.create("query_readout", dim=case.config["embedding_dim"], num_heads=case.config["num_heads"])
    attention.load_official(last, {key: value for key, value in case.state.items() if not key.startswith("layers.")})
    queries = last(tokens, features, q_pos=first, kv_pos=position)
    keys = features.transpose(1, 2).unflatten(2, grid)
    (gradient,) = torch.autograd.grad(queries.sum() + keys.sum(), image)
    return {"output.queries": queries, "output.keys": keys, "grad.input.image_embedding": gradient}


def _reader(case: Case, state: dict[str, Tensor]) -> torch.nn.Module:
    module = attention.create(
        "query_readout",
        dim=case.config["embedding_dim"],
        num_heads=case.config["num_heads"],
        downsample_rate=case.config["attention_downsample_rate"],
        norm=None,
        residual=False,
    )
    return attention.load_official(module, state)


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])
