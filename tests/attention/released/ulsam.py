"""Group after group, each layer on its own, the weighted group added to itself."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.ulsam import SubspaceAttention


def released(module: SubspaceAttention) -> Callable[[Tensor], Tensor]:
    def normalise(x: Tensor, norm: torch.nn.BatchNorm1d, part: slice) -> Tensor:
        return F.batch_norm(
            x, norm.running_mean[part], norm.running_var[part], norm.weight[part], norm.bias[part], eps=norm.eps
        )

    def run(x: Tensor) -> Tensor:
        width = module.dim // module.num_splits
        outputs = []
        for i, group in enumerate(torch.chunk(x, module.num_splits, dim=1)):
            part = slice(i * width, (i + 1) * width)
            dws, point = module.conv_dws, module.conv_point
            out = F.conv2d(group, dws.weight[part, :, None], dws.bias[part], groups=width)
            out = F.max_pool2d(F.relu(normalise(out, module.bn_dws, part)), 3, 1, 1)
            out = F.conv2d(out, point.weight[i : i + 1, ..., None], point.bias[i : i + 1])
            out = F.relu(normalise(out, module.bn_point, slice(i, i + 1)))
            out = F.softmax(out.flatten(2), dim=2).view(out.shape).expand(group.shape)
            outputs.append(torch.mul(out, group) + group)
        return torch.cat(outputs, dim=1)

    return run
