"""Low-rank attention with the scores of all pairs of tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from attention.low_rank import LowRankMixer


def released_mixer(module: LowRankMixer) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        scores = torch.tanh((tokens @ module.p)[:, :, None] * (tokens @ module.q)[:, None])  # (B, N, N, heads)
        weights = (scores / scores.norm(dim=-1, keepdim=True)).softmax(2)
        values = module.v(tokens).unflatten(-1, (module.num_heads, -1))
        return module.proj(torch.einsum("bijh,bjhd->bihd", weights, values).flatten(2)).view(x.shape)

    return run
