"""Every flow, its reciprocal and the reweighted tensors written out, heads first, as in Flowformer's code."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from attention.flow import FlowAttention, FlowCross

_EPS = 1e-6


def released_mixer(module: FlowAttention) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        q, k, v = module.qkv(x.flatten(1, -2)).chunk(3, dim=-1)
        return _attend(module, q, k, v).view(x.shape)

    return run


def released_cross(module: FlowCross) -> Callable[[Tensor, Tensor], Tensor]:
    def run(q: Tensor, kv: Tensor) -> Tensor:
        return _attend(module, module.q(q), *module.kv(kv).chunk(2, dim=-1))

    return run


def _attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def heads(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], module.num_heads, -1).transpose(1, 2)

    q, k, v = heads(q).sigmoid(), heads(k).sigmoid(), heads(v)
    after = module.eps_after

    def flow(rows: Tensor, sums: Tensor) -> Tensor:
        return torch.sum((rows + _EPS) * (sums[:, :, None] + _EPS), dim=3) + after

    of_query = 1 / flow(q, k.sum(2))
    of_key = 1 / flow(k, q.sum(2))
    conserved_query = flow(q, (k * of_key[..., None]).sum(2))
    conserved_key = flow(k, (q * of_query[..., None]).sum(2)).clamp(-1, 1)
    allocation = torch.sigmoid(conserved_query * (q.shape[2] / k.shape[2]))
    competition = conserved_key.softmax(-1) * k.shape[2]
    state = k.transpose(-2, -1) @ (v * competition[..., None])
    out = (q * of_query[..., None]) @ state * allocation[..., None]
    return module.proj(out.transpose(1, 2).flatten(2))
