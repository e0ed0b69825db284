"""Partitions cut out by copies, the bias looked up by an index table, as in the code of MaxViT."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.max_vit import PartitionAttention


def released(module: PartitionAttention) -> Callable[[Tensor], Tensor]:
    h, w = module.window_size
    grid = module.kind_of_window == "grid"
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], -1)
    offset = places[:, None] - places[None]
    if module.dialect == "tf":
        offset = -offset
    down, across = (offset + torch.tensor([h - 1, w - 1])).unbind(-1)

    def run(x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        seen = x.new_ones(1, height, width, 1)
        x, seen = (F.pad(t, (0, 0, 0, -width % w, 0, -height % h)) for t in (x, seen))
        full = x.shape
        parts, seen = _cut(x, h, w, grid), _cut(seen, h, w, grid)[..., 0]
        if module.dialect == "tf":
            qkv = module.qkv(parts).reshape(len(parts), h * w, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
        else:
            qkv = module.qkv(parts).reshape(len(parts), h * w, module.num_heads, 3, -1).permute(3, 0, 2, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * module.head_dim**-0.5) @ k.transpose(-2, -1)
        table = module.relative_position_bias_table
        if table is not None:
            shape = (module.num_heads, 2 * h - 1, 2 * w - 1)
            table = table if module.dialect == "tf" else table.t().reshape(shape)
            scores = scores + table[:, down.to(x.device), across.to(x.device)]
        hidden = torch.where(seen == 0, -torch.inf, 0.0)[:, None, None]
        scores = scores.unflatten(0, (batch, -1)) + hidden
        out = scores.softmax(-1).nan_to_num().flatten(0, 1) @ v
        out = module.proj(out.transpose(1, 2).flatten(2))
        if grid:
            out = out.reshape(batch, full[1] // h, full[2] // w, h, w, dim).permute(0, 3, 1, 4, 2, 5)
        else:
            out = out.reshape(batch, full[1] // h, full[2] // w, h, w, dim).transpose(2, 3)
        return out.reshape(full)[:, :height, :width]

    return run


def _cut(x: Tensor, h: int, w: int, grid: bool) -> Tensor:
    """(B, H, W, C) as (B * parts, h w, C)."""
    batch, height, width, channels = x.shape
    if grid:
        parts = x.reshape(batch, h, height // h, w, width // w, channels).permute(0, 2, 4, 1, 3, 5)
    else:
        parts = x.reshape(batch, height // h, h, width // w, w, channels).transpose(2, 3)
    return parts.reshape(-1, h * w, channels)
