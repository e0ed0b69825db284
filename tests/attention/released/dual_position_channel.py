"""Matrices of places by places and of channels by channels, each added to the map."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.dual_position_channel import DualAttention


def released(module: DualAttention) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return _position(module, x) + _channel(module, x)

    return run


def _position(module: DualAttention, x: Tensor) -> Tensor:
    part = module.position
    weight, bias = part.qkv.weight[..., None], part.qkv.bias
    q, k, v = F.conv1d(x.flatten(2), weight, bias).split([part.width, part.width, part.dim], 1)
    attention = torch.softmax(torch.bmm(q.permute(0, 2, 1), k), dim=-1)
    return part.gamma * torch.bmm(v, attention.permute(0, 2, 1)).view(x.shape) + x


def _channel(module: DualAttention, x: Tensor) -> Tensor:
    part = module.channel
    flat = x.flatten(2)
    energy = torch.bmm(flat, flat.permute(0, 2, 1))
    if part.form == "danet":
        attention = torch.softmax(energy.max(-1, keepdim=True)[0].expand_as(energy) - energy, dim=-1)
        out = torch.bmm(attention, flat)
    else:
        rows = flat.permute(0, 2, 1)
        out = torch.bmm(rows, torch.softmax(energy, dim=-1)).permute(0, 2, 1)
    return part.gamma * out.reshape(x.shape) + x
