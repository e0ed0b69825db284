"""Patches unfolded, mixed and folded back, as VOLO's code does."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from attention.outlook import OutlookAttention


def released(module: OutlookAttention) -> Callable[[Tensor], Tensor]:
    k, s, heads = module.kernel_size, module.stride, module.num_heads

    def run(x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        down, across = -(-height // s), -(-width // s)
        v = module.v(x).permute(0, 3, 1, 2)
        v = F.unfold(v, k, padding=k // 2, stride=s).reshape(batch, heads, dim // heads, k * k, down * across)
        centres = F.avg_pool2d(x.permute(0, 3, 1, 2), s, s, ceil_mode=True).permute(0, 2, 3, 1)
        scores = module.attn(centres).reshape(batch, down * across, heads, k * k, k * k).permute(0, 2, 1, 3, 4)
        mixed = (scores * module.head_dim**-0.5).softmax(-1) @ v.permute(0, 1, 4, 3, 2)
        mixed = mixed.permute(0, 1, 4, 3, 2).reshape(batch, dim * k * k, down * across)
        out = F.fold(mixed, (height, width), k, padding=k // 2, stride=s)
        return module.proj(out.permute(0, 2, 3, 1))

    return run
