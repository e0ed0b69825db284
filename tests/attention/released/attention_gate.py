"""Full convolutions, batch normalisations on their own, projections concatenated."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.attention_gate import AttentionGate


def released(module: AttentionGate) -> Callable[..., Tensor]:
    def layer(x: Tensor, conv: nn.Conv1d, norm: nn.Module) -> Tensor:
        axes = x.dim() - 2
        weight = conv.weight.reshape(*conv.weight.shape[:2], *[1] * axes)
        out = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes](x, weight, conv.bias)
        return norm(out.flatten(2)).reshape(out.shape)

    def run(x: Tensor, signal: Tensor | None = None) -> Tensor:
        signal = x if signal is None else signal
        if signal.shape[2:] != x.shape[2:]:
            mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[x.dim() - 2]
            signal = F.interpolate(signal, x.shape[2:], mode=mode)
        query = layer(signal, module.signal_proj, module.signal_norm)
        key = layer(x, module.map_proj, module.map_norm)
        merged = torch.cat([query, key], 1) if module.merge == "concatenation" else query + key
        return torch.sigmoid(layer(torch.relu(merged), module.score, module.score_norm)) * x

    return run
