"""The dense estimate, the dense mask, and the dense attention it is applied to."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from attention.sparsifiner import SparsifinerAttention


def released(module: SparsifinerAttention) -> Callable[[Tensor], Tensor]:
    predictor = module.mask_predictor

    def run(x: Tensor) -> Tensor:
        batch, *_, dim = x.shape
        qkv = module.qkv(x.reshape(batch, -1, dim)).reshape(batch, -1, 3, module.num_heads, module.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        keys = torch.einsum("bhnc,nm->bhmc", predictor.proj_c_k(k), predictor.proj_n)
        scores = predictor.proj_c_q(q) @ keys.transpose(-2, -1) * module.num_heads**-0.5
        shares = scores.softmax(-1)
        least = shares.topk(predictor.coefficients, -1).values[..., -1:]
        shares = torch.where(shares >= least, shares, 0.0)
        basis = predictor.proj_back_n.t().abs()
        estimate = shares @ torch.where(basis > predictor.threshold, basis, 0.0)
        best = estimate.topk(math.ceil(module.keep_rate * estimate.shape[-1]), -1).indices
        mask = torch.zeros_like(estimate).scatter_(-1, best, 1.0).detach()
        scores = (q @ k.transpose(-2, -1)) * module.head_dim**-0.5
        attention = scores.masked_fill(mask == 0, -torch.inf).softmax(-1)
        return module.proj((attention @ v).transpose(1, 2).reshape(batch, -1, dim)).reshape(x.shape)

    return run
