"""Padded windows cut out by copies, then channel attention from transposed copies, as in DaViT's code."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from attention.dual_window_channel import ChannelGroupAttention, DualWindowChannelAttention
from attention.window import WindowAttention


def released(module: DualWindowChannelAttention) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        assert module.window is not None and module.channel is not None
        return _channels(module.channel, _windows(module.window, x))

    return run


def _windows(module: WindowAttention, x: Tensor) -> Tensor:
    batch, height, width, dim = x.shape
    h, w = module.window_size
    x = F.pad(x, (0, 0, 0, -width % w, 0, -height % h))
    rows, columns = x.shape[1] // h, x.shape[2] // w
    cut = x.view(batch, rows, h, columns, w, dim).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, h * w, dim)
    qkv = module.qkv(cut).reshape(len(cut), h * w, 3, module.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = ((q * module.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    out = module.proj(out.transpose(1, 2).reshape(len(cut), h * w, dim))
    out = out.view(batch, rows, columns, h, w, dim).permute(0, 1, 3, 2, 4, 5).contiguous().view(x.shape)
    return out[:, :height, :width].contiguous()


def _channels(module: ChannelGroupAttention, x: Tensor) -> Tensor:
    assert module.version == 1
    batch, height, width, dim = x.shape
    qkv = module.qkv(x.view(batch, -1, dim)).reshape(batch, -1, 3, module.num_heads, module.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    attention = ((k * module.head_dim**-0.5).transpose(-1, -2) @ v).softmax(-1)
    out = (attention @ q.transpose(-1, -2)).transpose(-1, -2)
    return module.proj(out.transpose(1, 2).reshape(batch, height, width, dim))
