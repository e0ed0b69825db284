"""Distances, features and codes written out, heads first, as in EcoFormer's code."""

from collections.abc import Callable

import torch
from torch import Tensor

from attention.ecoformer import EcoFormerAttention


def released(module: EcoFormerAttention) -> Callable[[Tensor], Tensor]:
    assert module.form == "released"

    def run(x: Tensor) -> Tensor:
        batch, tokens = len(x), x[0, ..., 0].numel()

        def heads(z: Tensor) -> Tensor:
            return z.reshape(batch, tokens, module.num_heads, -1).transpose(1, 2)

        qk, v = heads(module.to_qk(x)), heads(module.to_v(x))
        unit = qk / qk.norm(dim=-1, keepdim=True)
        distance = (unit[..., None, :] - module.hash.anchor[..., None, :, :]).square().sum(-1)
        features = torch.exp(-distance / (2 * distance.mean((2, 3), keepdim=True))) - module.hash.mvec
        codes = torch.sign(torch.einsum("hbm,zhnm->zhnb", module.hash.A, features))
        constant = codes.shape[-1] + 1
        numerator = codes @ (codes.transpose(-2, -1) @ v) + constant * v
        denominator = codes @ codes.sum(2)[..., None] + constant * tokens
        return module.proj((numerator / denominator).transpose(1, 2).reshape(x.shape))

    return run
