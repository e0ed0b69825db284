"""Reversed attention with its matrix, transposed, and the gates multiplied into it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.reversed import ReversedAttention


def released(module: ReversedAttention) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        grid = x.shape[1:-1]
        x = x.flatten(1, -2)
        qkv = module.qkv(x).reshape(*x.shape[:2], 3, module.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q * module.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1)
        heads = (module.head_selector(x) / module.temperature).softmax(-1)
        message = torch.sigmoid(module.message_fc2(F.gelu(module.message_fc1(x))))
        attention = attention * (heads * message).transpose(1, 2)[..., None]
        out = attention.transpose(-2, -1) @ v
        return module.proj(out.transpose(1, 2).flatten(2)).unflatten(1, grid)

    return run
