"""What DuoFormer is made of: tokens of several scales grouped by patch, the scale token, the two kinds of attention.

Source and licence: see :mod:`backbones.duoformer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.models import checkpoint
from torch import Tensor, nn

from attention.layout import heads_last, split_qkv
from backbones.choices import Choice
from backbones.isotropic import BesidePrefix, positions_for

Grid = tuple[int, int]
DEVIATION = 0.036
"""Of the first values of tokens and positions."""


def group(map_: Tensor, grid: Grid) -> Tensor:
    """Tokens of a map by the patches that lie over them: (B, C, H * s, W * s) to (B, H * W, s * s, C).

    Those of a patch are in the order of rows, but for cells of 2 x 2, which the released code lists by columns.
    """
    side = map_.shape[2] // grid[0]
    cells = map_.unflatten(3, (grid[1], side)).unflatten(2, (grid[0], side))  # (B, C, H, rows, W, columns)
    order = (0, 2, 4, 5, 3, 1) if side == 2 else (0, 2, 4, 3, 5, 1)
    return cells.permute(order).flatten(3, 4).flatten(1, 2)


def ungroup(tokens: Tensor, grid: Grid) -> Tensor:
    """The inverse of :func:`group`: (B, H * W, s * s, C) to (B, C, H * s, W * s)."""
    side = math.isqrt(tokens.shape[2])
    cells = tokens.unflatten(2, (side, side)).unflatten(1, grid)
    order = (0, 5, 1, 4, 2, 3) if side == 2 else (0, 5, 1, 3, 2, 4)
    return cells.permute(order).flatten(4, 5).flatten(2, 3).contiguous()


class ScaleSummary(nn.Module):
    """One scale token for each patch, made from the trunk's four maps by convolutions.

    Args:
        widths: channels of the maps at strides 4, 8, 16 and 32.
        dim: channels C of the token.
        depth: 3 x 3 convolutions, each with batch norm and ReLU, behind the joined maps.
    """

    def __init__(self, widths: Sequence[int], dim: int, depth: int = 4) -> None:
        super().__init__()
        first, second = widths[:2]
        self.down0 = nn.Sequential(
            nn.Conv2d(first, first, 3, stride=2, padding=1), nn.Conv2d(first, first, 3, stride=2, padding=1)
        )
        self.down1 = nn.Conv2d(second, second, 3, stride=2, padding=1)
        self.convs = ConvStack(sum(widths), dim, depth)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, widths[i], H * 8 / 2**i, W * 8 / 2**i) to tokens (B, H * W, 1, C)."""
        same = [
            F.max_pool2d(self.down0(maps[0]), 2),
            F.max_pool2d(self.down1(maps[1]), 2),
            F.max_pool2d(maps[2], 2),
            maps[3],
        ]
        return self.convs(torch.cat(same, dim=1)).flatten(2).transpose(1, 2)[:, :, None]


class ConvStack(nn.Sequential):
    """3 x 3 convolutions with batch norm and ReLU: (B, inputs, H, W) to (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        layers: list[nn.Module] = []
        for n in range(depth):
            conv = nn.Conv2d(inputs if n == 0 else outputs, outputs, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers)


class SelfAttention(nn.Module):
    """Softmax attention over (..., N, C), all axes in front being items of the batch.

    Args:
        dim, num_heads: channels C, and heads of D channels.
        scale: of the scores; D^-0.5 by default.
        qk_norm: LayerNorms of each head's queries and keys.
    """

    def __init__(self, dim: int, num_heads: int, scale: float | None = None, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        items, tokens = x.shape[:-2], x.shape[-2]
        q, k, v = split_qkv(self.qkv(x.flatten(0, -3)), self.num_heads)
        q, k, v = (t.transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))
        out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), scale=self.scale)
        return self.proj(heads_last(out, (tokens,))).unflatten(0, items)

    def on_grid(self, x: Tensor, grid: Grid) -> Tensor:
        """Of a class token and the tokens of a grid, whose places are of no account."""
        return self(x)


class ScaleBlock(nn.Module):
    """Pre-norm block within patches: tokens (B, P, S, C) to the same, those of a patch seeing each other alone.

    Args:
        dim, num_heads: channels C, heads.
        scale: of the attention's scores.
        layer_scale: initial value of the branches' learned factors, None for none.
        drop_path: probability that an image skips a branch while training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        scale: float | None = None,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, num_heads, scale)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class TwoAttentions(nn.Module):
    """Attention between the scales of each patch, then between the patches and a class token.

    Attention between patches comes without norms, residuals and MLPs.

    Args:
        dim, depth, num_heads: channels C, blocks of each kind, heads.
        tokens: S, tokens of a patch over all scales, the first of which stands for the patch afterwards.
        grid: of the patches, for which positions are learned; they are resized for others.
        form: ``"plain"``, or ``"vit"``: scores are scaled by 2 C^-0.5, and a norm follows at the end. Between
            patches this has the first and the last attention of the released code alone: all that follow the first
            start from its output there, so that those in the middle are without effect.
        qk_norm: LayerNorms of queries and keys between patches; plain form only.
        layer_scale: initial value of branches' factors, None for none.
        drop_paths: rates of the blocks between scales.
        patch_mixers: a mixer to take the place of attention between patches.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        tokens: int,
        grid: Grid = (7, 7),
        form: str = "plain",
        qk_norm: bool = False,
        layer_scale: float | None = None,
        drop_paths: Sequence[float] | None = None,
        patch_mixers: Choice | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.grad_checkpointing = grid, False
        self.pos_embed_for_scale = _learned(1, 1, tokens, dim)
        self.cls_token = _learned(1, 1, dim)
        self.pos_embed = _learned(1, 1 + math.prod(grid), dim)
        scale = None if form == "plain" else 2 * dim**-0.5
        rates = [0.0] * depth if drop_paths is None else list(drop_paths)
        self.scale_blocks = nn.ModuleList(ScaleBlock(dim, num_heads, scale, layer_scale, rate) for rate in rates)
        self.patch_blocks = nn.ModuleList()
        for index in range(depth if form == "plain" else min(depth, 2)):
            attn: nn.Module = SelfAttention(dim, num_heads, scale, qk_norm and form == "plain")
            if patch_mixers is not None:
                mixer = patch_mixers.build(dim, index, num_heads=num_heads, input_size=grid)
                attn = BesidePrefix(mixer, dim, num_heads)
            self.patch_blocks.append(attn)
        self.norm = nn.Identity() if form == "plain" else nn.LayerNorm(dim, eps=1e-6)

    def between_scales(self, x: Tensor) -> Tensor:
        """(B, P, S, C) to the same."""
        x = x + self.pos_embed_for_scale
        for block in self.scale_blocks:
            x = self._run(block, x)
        return x

    def between_patches(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, P, C) of a grid of P patches to (B, 1 + P, C), the class token first."""
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + positions_for(self.pos_embed, self.grid, grid, 1)
        for attn in self.patch_blocks:
            x = self._run(partial(cast(SelfAttention | BesidePrefix, attn).on_grid, grid=grid), x)
        return self.norm(x)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Groups (B, P, S, C) to (B, 1 + P, C)."""
        return self.between_patches(self.between_scales(x)[:, :, 0], self.grid if grid is None else grid)

    def _run(self, step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return checkpoint(step, x) if self.grad_checkpointing else step(x)

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The released names to ours, without what the released code has and does not use."""
        vit = any(".qkv1." in key for key in state)
        last = max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=0)
        found = {}
        for key, value in state.items():
            if key.startswith(("patch_embed.", "fc_norm.", "head.")):
                continue
            if key.startswith("scaleBlocks."):
                if "_norm." not in key:
                    found[f"scale_blocks.{key.removeprefix('scaleBlocks.')}"] = value
            elif key.startswith("blocks.") and vit:
                _, index, *rest = key.split(".")
                inner = ".".join(rest)
                if inner.startswith(("attn.qkv.", "attn.proj.")):
                    if int(index) in (0, last):
                        found[f"patch_blocks.{min(int(index), 1)}.{inner.removeprefix('attn.')}"] = value
                else:
                    found[f"scale_blocks.{index}.{inner.replace('qkv1', 'qkv').replace('proj1', 'proj')}"] = value
            elif key.startswith("blocks."):
                found[key.replace("blocks.", "patch_blocks.").replace(".attn.", ".")] = value
            else:
                found[key] = value
        return found


def _learned(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=DEVIATION))
