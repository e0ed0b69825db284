"""Keys and values of every window gathered, scores and weights kept, as the layers written without a kernel do."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.neighborhood import NeighborhoodAttention


def released(module: NeighborhoodAttention) -> Callable[[Tensor], Tensor]:
    """For windows without stride that are not causal, on maps padded with zeros where they are small."""
    kernel, dilation = module.kernel_size, module.dilation

    def run(x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        below, right = (max(k * d - n, 0) for n, k, d in zip((height, width), kernel, dilation, strict=True))
        x = F.pad(x, (0, 0, 0, right, 0, below))
        size = x.shape[1:3]
        q, k, v = module.qkv(x).reshape(batch, *size, 3, module.num_heads, -1).permute(3, 0, 4, 1, 2, 5)
        rows, columns = (_neighbours(*axis).to(x.device) for axis in zip(size, kernel, dilation, strict=True))
        places = rows[:, None, :, None], columns[None, :, None, :]
        keys, values = (t[:, :, places[0], places[1]].flatten(4, 5) for t in (k, v))  # (B, heads, H, W, K K, D)
        scores = torch.einsum("bhijd,bhijpd->bhijp", q * module.head_dim**-0.5, keys)
        if module.rpb is not None:
            offsets = [
                (near - torch.arange(n, device=x.device)[:, None]) // d + side - 1
                for near, n, d, side in zip((rows, columns), size, dilation, kernel, strict=True)
            ]
            scores = scores + module.rpb[:, offsets[0][:, None, :, None], offsets[1][None, :, None, :]].flatten(3)
        out = torch.einsum("bhijp,bhijpd->bijhd", scores.softmax(-1), values)
        return module.proj(out.flatten(3)[:, :height, :width])

    return run


def _neighbours(length: int, kernel: int, dilation: int) -> Tensor:
    """(length, kernel): positions of the tokens that each position sees."""
    positions = torch.arange(length)
    group, place = positions % dilation, positions // dilation
    members = (length - group + dilation - 1) // dilation
    start = torch.minimum((place - kernel // 2).clamp_min(0), members - kernel)
    return group[:, None] + dilation * (start[:, None] + torch.arange(kernel))
