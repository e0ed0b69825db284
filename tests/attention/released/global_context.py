"""Windows cut out by copies, each with a copy of its image's query, the bias looked up by an index table."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.global_context import GlobalContextAttention


def released(module: GlobalContextAttention) -> Callable[[Tensor], Tensor]:
    h, w = module.window_size
    heads = module.num_heads
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], -1)
    offset = places[:, None] - places[None] + torch.tensor([h - 1, w - 1])
    index = offset[..., 0] * (2 * w - 1) + offset[..., 1]

    def query(x: Tensor) -> Tensor:
        assert module.generator is not None
        x = x.permute(0, 3, 1, 2)
        for block in module.generator.blocks:
            y = F.gelu(block.conv_dw(x))
            gate = block.fc2(F.gelu(block.fc1(F.adaptive_avg_pool2d(y, 1).flatten(1)))).sigmoid()
            x = x + block.conv_pw(y * gate[:, :, None, None])
            if module.generator.repeats:
                x = F.max_pool2d(x, 3, 2, 1)
        if x.shape[2:] != (h, w):
            x = F.interpolate(x, (h, w), mode="bicubic", align_corners=False)
        return x.permute(0, 2, 3, 1)

    def run(x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        shared = query(x).reshape(batch, 1, h * w, heads, -1)
        seen = F.pad(x.new_ones(1, height, width, 1), (0, 0, 0, -width % w, 0, -height % h))
        x = F.pad(x, (0, 0, 0, -width % w, 0, -height % h))
        windows = _cut(x, h, w)
        count = windows.shape[0] // batch
        q = shared.repeat(1, count, 1, 1, 1).reshape(-1, h * w, heads, dim // heads).transpose(1, 2)
        k, v = module.qkv(windows).reshape(-1, h * w, 2, heads, dim // heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * module.head_dim**-0.5) @ k.transpose(-2, -1)
        scores = scores + module.relative_position_bias_table[index.to(x.device)].permute(2, 0, 1)
        hidden = torch.where(_cut(seen, h, w)[..., 0] == 0, -torch.inf, 0.0)[:, None, None]
        scores = scores + hidden.repeat(batch, 1, 1, 1)
        out = module.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, h * w, dim))
        out = out.reshape(batch, x.shape[1] // h, x.shape[2] // w, h, w, dim).transpose(2, 3).reshape(x.shape)
        return out[:, :height, :width]

    return run


def _cut(x: Tensor, h: int, w: int) -> Tensor:
    """(B, H, W, C) as (B * windows, h w, C)."""
    return x.unflatten(2, (-1, w)).unflatten(1, (-1, h)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
