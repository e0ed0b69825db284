"""All harmonics of all scores at once, and the matrix of weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from attention.karat import KolmogorovArnoldAttention


def released(module: KolmogorovArnoldAttention) -> Callable[[Tensor], Tensor]:
    tables = module.operators

    def run(x: Tensor) -> Tensor:
        batch, *_, dim = x.shape
        qkv = module.qkv(x.reshape(batch, -1, dim)).reshape(batch, -1, 3, module.num_heads, module.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * module.head_dim**-0.5
        phase = scores[..., None] * torch.arange(1, tables.a.shape[-1] + 1, device=x.device)
        features = torch.einsum("bhkqm,hpqm->bhkp", phase.cos(), tables.a)
        features = features + torch.einsum("bhkqm,hpqm->bhkp", phase.sin(), tables.b)
        weights = torch.einsum("bhkp,hnp->bhkn", features, tables.W)
        return module.proj((weights @ v).transpose(1, 2).reshape(batch, -1, dim)).reshape(x.shape)

    return run
