"""Rotated features, states and gates written out, channels first, as in MALA's code."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.mala import MagnitudeAwareAttention


def released(module: MagnitudeAwareAttention) -> Callable[[Tensor], Tensor]:
    assert module.form == "linear" and module.rotary
    width = module.head_dim

    def run(x: Tensor) -> Tensor:
        batch, height, width_of_map, dim = x.shape
        tokens = height * width_of_map
        steps = (10000 ** -torch.linspace(0, 1, width // 4, device=x.device)).repeat_interleave(2)
        rows = torch.arange(height, device=x.device)[:, None, None] * steps
        columns = torch.arange(width_of_map, device=x.device)[None, :, None] * steps
        full = (height, width_of_map, width // 2)
        angles = torch.cat([rows.expand(full), columns.expand(full)], -1).view(tokens, width)
        cos, sin = angles.cos(), angles.sin()

        def rotate(z: Tensor) -> Tensor:
            swapped = torch.stack([-z[..., 1::2], z[..., ::2]], -1).flatten(-2)
            return z * cos + swapped * sin

        weight = module.qkv_gate.weight[..., None, None]
        maps = F.conv2d(x.permute(0, 3, 1, 2).contiguous(), weight, module.qkv_gate.bias)
        q, k, v, gate = maps.chunk(4, dim=1)
        lepe = F.conv2d(v, module.lepe.weight, module.lepe.bias, padding=2, groups=dim)

        def heads(z: Tensor) -> Tensor:
            return z.reshape(batch, module.num_heads, width, tokens).transpose(2, 3)

        q, k, v = heads(q), heads(k), heads(v)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        scale = width**-0.5
        z = q @ k.mean(2, keepdim=True).transpose(-2, -1) * scale
        q, k = rotate(q), rotate(k)
        state = (k.transpose(-2, -1) * (scale / tokens) ** 0.5) @ (v * (scale / tokens) ** 0.5)
        out = q @ state * (1 + 1 / (z + 1e-6)) - z * v.mean(2, keepdim=True)
        out = (out.transpose(2, 3).reshape(batch, dim, height, width_of_map) + lepe) * gate
        return F.conv2d(out, module.proj.weight[..., None, None], module.proj.bias).permute(0, 2, 3, 1)

    return run
