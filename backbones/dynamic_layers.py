"""The parts of Dynamic Perceiver: layers of latent tokens, one stage of both branches, the four exits.

Source: Han et al., Dynamic Perceiver for Efficient Visual Recognition, ICCV 2023, arXiv:2306.11248; the layers are
those of Perceiver IO, Jaegle et al., ICLR 2022, arXiv:2107.14795.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

READ_GRID = 7
"""Cells on each side of the grid to which a map is averaged before the latent tokens read it."""


class Attention(nn.Module):
    """Queries (B, N, dim) read a context (B, M, context): (B, N, dim); ``cells`` adds a learned bias to M keys."""

    def __init__(self, dim: int, context: int, inner: int, num_heads: int = 1, cells: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, inner, bias=False)
        self.k = nn.Linear(context, inner, bias=False)
        self.v = nn.Linear(context, inner, bias=False)
        self.proj = nn.Linear(inner, dim)
        self.key_bias = nn.Parameter(torch.zeros(1, cells, inner)) if cells else None

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(context), self.v(context)
        if self.key_bias is not None:
            k = k + self.key_bias.to(k.dtype)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Layer norm, linear, GELU, linear; the residual is the caller's."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class CrossLayer(nn.Module):
    """Pre-norm cross attention and MLP, both residual, of tokens (B, N, dim) to a context (B, M, context)."""

    def __init__(self, dim: int, context: int, inner: int, cells: int = 0) -> None:
        super().__init__()
        self.norm_query = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(context)
        self.attn = Attention(dim, context, inner, cells=cells)
        self.mlp = Mlp(dim, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn(self.norm_query(x), self.norm_context(context))
        return x + self.mlp(x)


class SelfLayer(nn.Module):
    """Pre-norm self attention and MLP, both residual, of tokens (B, N, dim)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = Attention(dim, dim, dim, num_heads)
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.attn(normed, normed)
        return x + self.mlp(x)


class Read(nn.Module):
    """Latent tokens (B, N, C) read a map (B, C, H, W) of any size, averaged to a fixed grid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.cross = CrossLayer(dim, dim, dim, cells=READ_GRID**2)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        cells = F.adaptive_avg_pool2d(self.local(x) + x, READ_GRID)
        return self.cross(z, cells.flatten(2).transpose(1, 2))


class Stage(nn.Module):
    """One stage of both branches: the latent observes the map, the map is convolved, the latent is written to it.

    Args:
        cnn: the convolutional stage, ``dim`` to ``out_dim`` channels.
        tokens: number of latent tokens; halved for the next stage unless it is the ``last``.
    """

    def __init__(
        self, cnn: nn.Module, dim: int, out_dim: int, tokens: int, depth: int, heads: int, mlp_ratio: float, last: bool
    ) -> None:
        super().__init__()
        self.read = Read(dim)
        self.think = nn.Sequential(*(SelfLayer(dim, heads, mlp_ratio) for _ in range(depth)))
        self.cnn = cnn
        context = dim if last else out_dim
        self.halve = None if last else nn.Sequential(nn.LayerNorm(tokens), nn.Linear(tokens, tokens // 2))
        self.widen = None if last else nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, out_dim))
        self.write = CrossLayer(out_dim, context, out_dim // 8)

    def observe(self, x: Tensor, z: Tensor) -> Tensor:
        """The latent (B, N, dim) after it has read the map (B, dim, H, W) and thought."""
        return self.think(self.read(z, x))

    def exchange(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The convolved map (B, out_dim, H', W') with the latent written to it, and the latent of the next stage."""
        if self.halve is not None and self.widen is not None:
            z = self.widen(self.halve(z.transpose(1, 2)).transpose(1, 2))
        pixels = self.write(x.flatten(2).transpose(1, 2), z)
        return pixels.transpose(1, 2).unflatten(2, x.shape[2:]).contiguous(), z


class Recycle(nn.Module):
    """An earlier answer (B, K) as features (B, dim) of the next one."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(num_classes, dim)
        self.bn = nn.BatchNorm1d(dim)

    def forward(self, logits: Tensor) -> Tensor:
        return F.relu(self.bn(self.fc(logits)))


class Exit(nn.Module):
    """Features (B, dim) to logits (B, K), with what the branch's own classifier has in front of its last layer."""

    def __init__(self, dim: int, hidden: int, num_classes: int, norm: bool, drop_rate: float) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim) if norm else nn.Identity()
        self.hidden = nn.Sequential(nn.Linear(dim, hidden), nn.Hardswish()) if hidden else nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(hidden or dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.hidden(self.bn(x))))


class Exits(nn.Module):
    """The four classifiers: latents of the last two stages and the map, each pooled, to logits."""

    def __init__(self, dims: tuple[int, int, int], hidden: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.dims = dims
        third, fourth, map_dim = dims
        self.exit1 = nn.Linear(third, num_classes)
        self.recycle1 = Recycle(num_classes, fourth)
        self.exit2 = nn.Linear(2 * fourth, num_classes)
        self.exit3 = Exit(map_dim, hidden, num_classes, norm=False, drop_rate=drop_rate)
        self.recycle2 = Recycle(num_classes, fourth)
        self.exit4 = Exit(map_dim + 2 * fourth, hidden, num_classes, norm=True, drop_rate=drop_rate)

    def reset(self, num_classes: int) -> None:
        """New linear layers where the number of classes enters; the rest is kept."""
        third, fourth, _ = self.dims
        like = self.exit1.weight
        place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.exit1 = nn.Linear(third, num_classes, **place)
        self.exit2 = nn.Linear(2 * fourth, num_classes, **place)
        for part in (self.exit3, self.exit4):
            part.fc = nn.Linear(part.fc.in_features, num_classes, **place)
        for recycle in (self.recycle1, self.recycle2):
            recycle.fc = nn.Linear(num_classes, fourth, **place)

    def second(self, fourth: Tensor, first: Tensor) -> Tensor:
        return self.exit2(torch.cat((fourth, self.recycle1(first)), dim=1))

    def last(self, pooled: Tensor, fourth: Tensor, second: Tensor) -> Tensor:
        return self.exit4(torch.cat((pooled, fourth, self.recycle2(second)), dim=1))

    def forward(self, pooled: Tensor) -> Tensor:
        """The last exit's logits for (B, map + fourth + third), as ``forward_head`` pools them."""
        third, fourth, map_dim = self.dims
        x, z4, z3 = pooled.split((map_dim, fourth, third), dim=1)
        return self.last(x, z4, self.second(z4, self.exit1(z3)))
