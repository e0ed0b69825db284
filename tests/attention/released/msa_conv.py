"""Windows of keys and values unfolded, zeros beyond the map included."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from attention.msa_conv import MSAConv


def released(module: MSAConv) -> Callable[[Tensor], Tensor]:
    conv = module.conv
    margin = conv.dilation * (conv.kernel_size - 1) // 2

    def unfold(x: Tensor) -> Tensor:
        windows = F.unfold(x, conv.kernel_size, dilation=conv.dilation, padding=margin)
        return windows.view(len(x), module.num_heads, module.head_dim, -1, *x.shape[2:])

    def run(x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        q, k, v = F.conv2d(x, conv.qkv.weight[..., None, None], conv.qkv.bias).chunk(3, dim=1)
        q = q.unflatten(1, (module.num_heads, -1))[:, :, :, None]
        weights = ((q * unfold(k)).sum(2) * module.head_dim**-0.5).softmax(2)
        out = (weights[:, :, None] * unfold(v)).sum(3).flatten(1, 2) + x
        return conv.mlp(out).relu().permute(0, 2, 3, 1)

    return run
