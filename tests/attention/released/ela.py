"""The two profiles one after the other, each product of the map written out."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.ela import EfficientLocalAttention


def released(module: EfficientLocalAttention) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows = torch.mean(x, dim=3, keepdim=True).view(batch, channels, height)
        columns = torch.mean(x, dim=2, keepdim=True).view(batch, channels, width)
        rows = module.gn(module.conv(rows))
        columns = (module.gn_w or module.gn)((module.conv_w or module.conv)(columns))
        if module.silu:
            rows, columns = F.silu(rows), F.silu(columns)
        rows = torch.sigmoid(rows).view(batch, channels, height, 1)
        columns = torch.sigmoid(columns).view(batch, channels, 1, width)
        return x * rows * columns

    return run
