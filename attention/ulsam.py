"""Ultra-lightweight subspace attention: each group of channels is weighted by one map of its own.

Source: Saini et al., ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks, WACV
2020, arXiv 2006.15102. The released code's layers, with their biases and batch normalisations, which the paper's count
of parameters leaves out; the groups are computed together. Volumes and signals, of which the paper does not speak,
differ in the axes of the pooling alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.conv_norm import pointwise_norm, wide
from attention.cost import Part, elementwise
from attention.gate import Gate
from attention.registry import register
from kernels.errors import InputError


@register("ulsam", kind="gate")
class SubspaceAttention(Gate):
    """Subspace attention: a group of channels times 1 plus a softmax over places (ULSAM, Saini et al. 2020).

    The weights that are returned are one map for each group, (B, num_splits, 1, \\*spatial).

    Args:
        dim: channels C, a multiple of ``num_splits``.
        num_splits: groups of channels; the paper's best are 4 or 8, by layer.

    Raises:
        InputError: the groups do not divide the channels.
    """

    about = About("Saini et al., WACV 2020, 2006.15102", "O(N)")
    grids = (1, 2, 3)

    def __init__(self, dim: int, num_splits: int = 4) -> None:
        super().__init__(dim)
        if num_splits < 1 or dim % num_splits:
            fitting = [n for n in range(1, dim + 1) if dim % n == 0]
            raise InputError(
                f"attention 'ulsam': num_splits={num_splits} does not divide {dim} channels; take one of "
                f"{', '.join(map(str, fitting))}."
            )
        self.num_splits = num_splits
        self.conv_dws = nn.Conv1d(dim, dim, 1, groups=dim)
        self.bn_dws = nn.BatchNorm1d(dim, momentum=0.9)
        self.conv_point = nn.Conv1d(dim, num_splits, 1, groups=num_splits)
        self.bn_point = nn.BatchNorm1d(num_splits, momentum=0.9)

    def apply_gate(self, x: Tensor, signal: Tensor | None) -> tuple[Tensor, Tensor]:
        grid = x.shape[2:]
        features = torch.relu(pointwise_norm(x.flatten(2), self.conv_dws, self.bn_dws)).unflatten(2, grid)
        pooled = _POOLS[len(grid)](features, 3, 1, 1).flatten(2)
        scores = torch.relu(pointwise_norm(pooled, self.conv_point, self.bn_point))
        weights = (1 + torch.softmax(wide(scores), -1)).to(x.dtype).unflatten(2, (1, *grid))
        return (x.unflatten(1, (self.num_splits, -1)) * weights).flatten(1, 2), weights

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, tokens = shape[0], math.prod(shape[1:])
        elements, maps = batch * tokens * self.dim, batch * tokens * self.num_splits
        return [
            elementwise("features", elements, tensors=1, flops=3),
            elementwise("largest neighbours", elements, tensors=0, flops=3 ** len(shape[1:])),
            elementwise("scores", elements, tensors=0, flops=2),
            elementwise("softmax", maps, tensors=1, flops=5),
            elementwise("product", elements),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state, its subspaces end to end."""
        count = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("subspaces.")), default=-1)
        renamed = {key: value for key, value in state.items() if not key.startswith("subspaces.")}
        for name in [key.removeprefix("subspaces.0.") for key in state if key.startswith("subspaces.0.")]:
            parts = [state[f"subspaces.{i}.{name}"] for i in range(count)]
            if name.endswith("num_batches_tracked"):
                renamed[name] = parts[0]
            else:
                whole = torch.cat(parts)
                renamed[name] = whole.flatten(2) if whole.dim() > 2 else whole
        return renamed


_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
