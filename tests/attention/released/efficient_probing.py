"""Efficient probing with all tokens projected to values, and the matrix of weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from attention.efficient_probing import EfficientProbing, EfficientProbingCross


def released_pooling(module: EfficientProbing) -> Callable[[Tensor], Tensor]:
    """From bags of one size, (B, N, C), to their features (B, C / d_out) before normalisation."""

    def run(x: Tensor) -> Tensor:
        scores = (module.cls_token * module.dim**-0.5).expand(len(x), -1, -1) @ x.transpose(1, 2)
        values = module.v(x).reshape(*x.shape[:2], module.num_branches, -1).transpose(1, 2)
        return (scores.softmax(-1)[:, :, None] @ values)[:, :, 0].flatten(1)

    return run


def released_cross(module: EfficientProbingCross) -> Callable[[Tensor, Tensor], Tensor]:
    def run(q: Tensor, kv: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], module.num_heads, -1).transpose(1, 2)

        weights = torch.softmax(heads(q) * module.head_dim**-0.5 @ heads(kv).transpose(-2, -1), -1)
        return (weights @ heads(module.v(kv))).transpose(1, 2).flatten(2)

    return run
