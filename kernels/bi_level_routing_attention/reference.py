"""Bi-level routing attention by gathering the routed regions, in plain PyTorch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.bi_level_routing_attention.regions import Regions


def routing_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region_graph: Tensor,
    query_grid: Regions,
    key_grid: Regions,
    scale: float,
    mask_padding: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, H, W, heads, E), log-sum-exp (B, heads, H, W), probabilities (B, heads, regions, tokens, keys)."""
    precise = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = query_grid.split(q), key_grid.split(k), key_grid.split(v)
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    head = torch.arange(q.shape[3], device=q.device)[:, None, None]
    graph = region_graph.expand(-1, q.shape[3], -1, -1)
    keys, values = (t[batch, head, graph].flatten(3, 4).to(precise) for t in (keys, values))
    scores = queries.to(precise) @ keys.mT * scale
    if mask_padding:
        inside = key_grid.inside(q.device)[graph].flatten(3)
        scores = scores.masked_fill(~inside[:, :, :, None], -torch.inf)
    probabilities = scores.softmax(-1)
    out = query_grid.join((probabilities @ values).to(q.dtype), planes=False)
    return out, query_grid.join(scores.logsumexp(-1, keepdim=True), planes=True).squeeze(2), probabilities
