"""Windows of keys unfolded for every block and one bias per pair of tokens, as implementations of HaloNet do."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.halo import HaloAttention


def released(module: HaloAttention) -> Callable[[Tensor], Tensor]:
    """Of either form, on maps extended to whole blocks."""
    layer = module.layer
    b, r, w, heads = layer.block_size, layer.halo_size, layer.window, layer.num_heads
    offset = torch.arange(w) - torch.arange(b)[:, None] + w - 1

    def run(x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        down, across = -(-height // b), -(-width // b)
        below, right = down * b - height, across * b - width
        q = F.pad(layer.q(x), (0, 0, 0, right, 0, below))
        q = q.reshape(batch, down, b, across, b, heads, -1).permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)
        kv = F.pad(layer.kv(x), (0, 0, r, right + r, r, below + r)).permute(0, 3, 1, 2)
        kv = F.unfold(kv, w, stride=b).reshape(batch, -1, w * w, down, across).permute(0, 3, 4, 2, 1)
        if layer.form == "masked":
            k, v = kv.split([heads * layer.head_dim, heads * layer.value_dim], -1)
            k, v = k.unflatten(-1, (heads, -1)), v.unflatten(-1, (heads, -1))
        else:
            k, v = kv.unflatten(-1, (heads, -1)).split([layer.head_dim, layer.value_dim], -1)
        k, v = k.transpose(3, 4), v.transpose(3, 4)  # (B, down, across, heads, w w, D)
        grid = q.unflatten(4, (b, b))
        index = offset.to(x.device)
        rows = torch.einsum("bnmhyxd,ykd->bnmhyxk", grid, layer.height_rel[index])
        columns = torch.einsum("bnmhyxd,xkd->bnmhyxk", grid, layer.width_rel[index])
        bias = (rows[..., None] + columns[..., None, :]).flatten(6).flatten(4, 5) * layer.position_factor
        scores = (q @ k.mT + bias) * layer.scale
        if layer.form == "masked":
            seen = F.pad(x.new_ones(1, 1, height, width), (r, right + r, r, below + r))
            seen = F.unfold(seen, w, stride=b).reshape(w * w, down, across).permute(1, 2, 0)
            scores = scores.masked_fill(seen[:, :, None, None] == 0, -torch.inf)
        out = (scores.softmax(-1) @ v).unflatten(4, (b, b)).permute(0, 1, 4, 2, 5, 3, 6)
        return layer.proj(out.reshape(batch, down * b, across * b, -1)[:, :height, :width])

    return run
