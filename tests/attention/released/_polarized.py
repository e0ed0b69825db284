"""Queries and values projected over the whole map, both gates multiplied with it one by one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.polarized import PolarizedAttention


def parallel(module: PolarizedAttention) -> Callable[[Tensor], Tensor]:
    return lambda x: _channel(module, x) + _spatial(module, x, sequential=False)


def sequential(module: PolarizedAttention) -> Callable[[Tensor], Tensor]:
    return lambda x: _spatial(module, _channel(module, x), sequential=True)


def _channel(module: PolarizedAttention, x: Tensor) -> Tensor:
    batch, dim, *grid = x.shape
    values = _conv(module.channel_value, x).reshape(batch, dim // 2, -1)
    query = _conv(module.channel_query, x).reshape(batch, -1, 1).softmax(1)
    context = torch.matmul(values, query)[..., 0]
    gate = module.channel_up(context)
    if module.form == "paper":
        gate = module.norm(gate)
    return x * torch.sigmoid(gate).reshape(batch, dim, *[1] * len(grid))


def _spatial(module: PolarizedAttention, x: Tensor, sequential: bool) -> Tensor:
    batch, dim, *grid = x.shape
    query = _conv(module.spatial_query, x).flatten(2).mean(-1)[:, None]
    values = _conv(module.spatial_value, x).reshape(batch, dim // 2, -1)
    if module.form == "paper":
        gate = query.softmax(-1) @ values
    elif sequential:
        gate = query @ values.softmax(-1)
    else:
        gate = (query @ values).softmax(-1)
    return x * torch.sigmoid(gate).reshape(batch, 1, *grid)


def _conv(layer: nn.Linear, x: Tensor) -> Tensor:
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    return conv(x, layer.weight.reshape(*layer.weight.shape, *[1] * (x.dim() - 2)), layer.bias)
