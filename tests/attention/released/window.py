"""Windows cut out by copies, the bias looked up by an index table, as in Swin's code."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.window import WindowAttention


def released(module: WindowAttention) -> Callable[[Tensor], Tensor]:
    h, w = module.window_size
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], -1)
    offset = places[:, None] - places[None] + torch.tensor([h - 1, w - 1])
    index = offset[..., 0] * (2 * w - 1) + offset[..., 1]

    def run(x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        shifts = [0 if n <= side else module.shift for n, side in zip((height, width), (h, w), strict=True)]
        seen = x.new_ones(1, height, width, 1)
        x, seen = (F.pad(t, (0, 0, 0, -width % w, 0, -height % h)) for t in (x, seen))
        regions = torch.zeros(x.shape[1:3])
        for part, cut in enumerate(_parts(h, shifts[0])):
            for other, across in enumerate(_parts(w, shifts[1])):
                regions[cut, across] = 3 * part + other
        x, seen = (t.roll((-shifts[0], -shifts[1]), (1, 2)) for t in (x, seen))
        windows, seen = _cut(x, h, w), _cut(seen, h, w)[..., 0]
        region = _cut(regions[None, ..., None].to(x.device), h, w)[..., 0]
        qkv = module.qkv(windows).reshape(len(windows), h * w, 3, module.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * module.head_dim**-0.5) @ k.transpose(-2, -1)
        if module.relative_position_bias_table is not None:
            scores = scores + module.relative_position_bias_table[index.to(x.device)].permute(2, 0, 1)
        hidden = torch.where((region[:, :, None] != region[:, None]) | (seen[:, None] == 0), -torch.inf, 0.0)[:, None]
        scores = scores.unflatten(0, (batch, -1)) + hidden
        out = scores.softmax(-1).nan_to_num().flatten(0, 1) @ v
        out = module.proj(out.transpose(1, 2).flatten(2))
        out = out.reshape(batch, x.shape[1] // h, x.shape[2] // w, h, w, dim).transpose(2, 3).reshape(x.shape)
        return out.roll(shifts, (1, 2))[:, :height, :width]

    return run


def _parts(side: int, shift: int) -> list[slice]:
    """Bands of a rolled map whose tokens were neighbours before the roll."""
    return [slice(0, -side), slice(-side, -shift), slice(-shift, None)] if shift else [slice(0, None)]


def _cut(x: Tensor, h: int, w: int) -> Tensor:
    """(B, H, W, C) as (B * windows, h w, C)."""
    return x.unflatten(2, (-1, w)).unflatten(1, (-1, h)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
