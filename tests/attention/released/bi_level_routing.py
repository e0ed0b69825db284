"""Keys and values of the chosen regions copied for every region of queries, as BiFormer's code does."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.bi_level_routing import BiLevelRoutingAttention


def released(module: BiLevelRoutingAttention) -> Callable[[Tensor], Tensor]:
    """Of the legacy form with hard routing and without pooling; what sticks out of the map is given no weight."""
    heads, positions = module.num_heads, module.lepe
    assert positions is not None

    def run(x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        rows, columns = (-(-n // count) for n, count in zip((height, width), module.regions, strict=True))
        down, across = -(-height // rows), -(-width // columns)
        q, k, v = module.qkv(x).split([module.qk_dim, module.qk_dim, module.dim], -1)
        lepe = F.conv2d(v.permute(0, 3, 1, 2), positions.weight, positions.bias, padding="same", groups=module.dim)
        lepe = lepe.permute(0, 2, 3, 1)
        seen = x.new_ones(batch, height, width, 1)
        q, k, v, seen = (_regions(t, down, rows, across, columns) for t in (q, k, v, seen))
        count = seen.sum(2)
        queries, keys = ((t.sum(2) / count).detach() for t in (q, k))
        chosen = (queries * module.scale @ keys.mT).topk(min(module.topk, down * across), -1).indices
        index = chosen[..., None, None].expand(-1, -1, -1, *k.shape[2:])
        source = k[:, None].expand(-1, down * across, -1, -1, -1)
        keys = source.gather(2, index).flatten(2, 3)
        index = chosen[..., None, None].expand(-1, -1, -1, *v.shape[2:])
        values = v[:, None].expand(-1, down * across, -1, -1, -1).gather(2, index).flatten(2, 3)
        index = chosen[..., None, None].expand(-1, -1, -1, *seen.shape[2:])
        present = seen[:, None].expand(-1, down * across, -1, -1, -1).gather(2, index).flatten(2)
        a, b, c = (t.unflatten(-1, (heads, -1)).transpose(2, 3) for t in (q, keys, values))
        scores = (a * module.scale) @ b.mT + torch.where(present == 0, -torch.inf, 0.0)[:, :, None, None]
        out = (scores.softmax(-1) @ c).transpose(2, 3).flatten(3)
        out = out.reshape(batch, down, across, rows, columns, -1).transpose(2, 3)
        out = out.reshape(batch, down * rows, across * columns, -1)[:, :height, :width]
        return module.proj(out + lepe)

    return run


def _regions(x: Tensor, down: int, rows: int, across: int, columns: int) -> Tensor:
    """(B, H, W, C) as (B, regions, tokens, C)."""
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, across * columns - width, 0, down * rows - height))
    return (
        x.reshape(batch, down, rows, across, columns, channels)
        .transpose(2, 3)
        .reshape(batch, down * across, rows * columns, channels)
    )
