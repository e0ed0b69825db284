"""CrossViT's attention with all tokens projected, the query's own token in front, and the matrix of weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from attention.crossvit import CrossViTAttention


def released(module: CrossViTAttention) -> Callable[[Tensor, Tensor], Tensor]:
    def run(q: Tensor, kv: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], module.num_heads, -1).transpose(1, 2)

        queries = q.shape[1]
        x = torch.cat([q, kv], dim=1) if module.own_key else kv
        scores = heads(module.wq(q)) @ heads(module.wk(x)).transpose(-2, -1) * module.head_dim**-0.5
        if module.own_key and queries > 1:  # the paper has one query; of several, each sees its own token alone
            others = ~torch.eye(queries, x.shape[1], dtype=torch.bool, device=x.device)
            others[:, queries:] = False
            scores = scores.masked_fill(others, -torch.inf)
        return module.proj((scores.softmax(-1) @ heads(module.wv(x))).transpose(1, 2).flatten(2))

    return run
