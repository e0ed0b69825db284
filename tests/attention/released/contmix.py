"""Affinities with all regions, every kernel written out, windows unfolded; each convolution and norm on its own."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.contmix import ContMix
from attention.dilated_reparam import BRANCHES


def released(module: ContMix) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2).contiguous()
        batch, channels, height, width = x.shape
        gate = F.silu(_in_turn(module.gate, x))
        large = module.lepe[0]
        static = large.origin_bn(large.lk_origin(x))
        for side, dilation in BRANCHES[module.kernel_size]:
            branch = large.get_submodule(f"dil_conv_k{side}_{dilation}")(x)
            static = static + large.get_submodule(f"dil_bn_k{side}_{dilation}")(branch)
        static = module.lepe[1](static)
        short = min(height, width)
        if short < module.kernel_size:
            ratio = module.kernel_size / short
            size = [module.kernel_size if n == short else int(ratio * n) for n in (height, width)]
            x = F.interpolate(x, size, mode="bilinear")
        rows, columns = x.shape[2:]
        groups = 2 * module.num_heads
        query = _in_turn(module.weight_query, x) * (channels // groups) ** -0.5
        key = _in_turn(module.weight_key, F.adaptive_avg_pool2d(x, module.regions))
        query = query.reshape(batch, groups, -1, rows * columns)
        key = key.reshape(batch, groups, -1, module.regions**2)
        affinity = torch.einsum("bgcn,bgcl->blgn", query, key)
        kernels = module.weight_proj(affinity).permute(0, 2, 3, 1)
        near, far = kernels.split([module.smk_size**2, module.kernel_size**2], -1)
        values = _in_turn(module.weight_value, x).chunk(2, 1)
        mixed = torch.cat([_mix(values[0], near, module.rpb1), _mix(values[1], far, module.rpb2)], 1)
        if short < module.kernel_size:
            mixed = F.adaptive_avg_pool2d(mixed, (height, width))
        out = _in_turn(module.fusion_proj, mixed) + static
        out = out * module.se_layer.proj(out.mean((2, 3), keepdim=True))
        return module.proj(gate * out).permute(0, 2, 3, 1)

    return run


def _in_turn(module: nn.Module, x: Tensor) -> Tensor:
    for step in module.children():
        x = step(x)
    return x


def _mix(value: Tensor, kernels: Tensor, table: Tensor) -> Tensor:
    """(B, C, H, W) mixed by (B, G, N, k k) logits: the window of a token at the border is that of the nearest token
    whose window is within the map."""
    batch, channels, height, width = value.shape
    groups, side = table.shape[0], (table.shape[1] + 1) // 2
    starts = [(torch.arange(n) - side // 2).clamp(0, n - side) for n in (height, width)]
    offsets = [
        start[:, None] + torch.arange(side) - torch.arange(n)[:, None] + side - 1
        for start, n in zip(starts, (height, width), strict=True)
    ]
    bias = table[:, offsets[0][:, None, :, None], offsets[1][None, :, None, :]].reshape(groups, height * width, -1)
    weights = (kernels + bias).softmax(-1)
    windows = F.unfold(value, side).reshape(batch, channels, side**2, height - side + 1, width - side + 1)
    windows = windows[:, :, :, starts[0]][..., starts[1]].reshape(batch, groups, -1, side**2, height * width)
    return torch.einsum("bgnp,bgcpn->bgcn", weights, windows).reshape(batch, channels, height, width)
