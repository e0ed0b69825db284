"""Cross attention of CrossViT: the class token of one branch reads the patch tokens of the other.

Source: Chen, Fan and Panda, CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification, ICCV
2021, arXiv 2103.14899. Where several cross-attention blocks follow each other in a fusion, each reads the patch tokens
here; in the released code, whose models have one, only the first does.

With few queries, as in the paper, the tokens that are read are not projected (see :mod:`attention.folding`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.block_parts import DropPath
from attention.cost import Part, attend, projection
from attention.cross import Cross
from attention.folding import Folded, folded_cost, folds, read_folded
from attention.layout import heads_first, split_heads, weights_of
from attention.masking import key_mask
from attention.parameters import Probability
from attention.registry import register
from attention.softmax import SoftmaxAttention
from kernels.errors import InputError


@register("crossvit", kind="cross")
class CrossViTAttention(Cross):
    """CrossViT's attention: a class token reads another branch's tokens, and itself (Chen et al. 2021).

    Args:
        dim: channels C.
        num_heads: heads.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        own_key: whether a query is a key and a value of its own, in front of the tokens, as in the paper; the weights
            are then (B, heads, M, 1 + N).
        proj_drop: dropout on the output while training.
    """

    about = About("Chen, Fan and Panda, ICCV 2021, 2103.14899", "O(M N)", "sdpa", "Apache-2.0")

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, own_key: bool = True, proj_drop: Probability = 0.0
    ) -> None:
        super().__init__(dim, num_heads)
        self.own_key = own_key
        self.wq = nn.Linear(dim, dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias)
        self.wv = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def read(
        self, q: Tensor, kv: Tensor, mask: Tensor | None, want_weights: bool, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if folds(q.shape[1], self.num_heads, self.dim, self.dim):
            out, seen = self._read_folded(q, kv, mask)
            weights = seen.to(q.dtype) if want_weights else None
        else:
            out, weights = self._read_projected(q, kv, mask, want_weights)
        return self.proj_drop(self.proj(out)), weights

    def _read_folded(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        layers = Folded(self.wk, self.wv, self.num_heads)
        return read_folded(self.wq(q), kv, kv, layers, mask, q if self.own_key else None)

    def _read_projected(
        self, q: Tensor, kv: Tensor, mask: Tensor | None, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        queries = q.shape[1]
        tokens = torch.cat([q, kv], 1) if self.own_key else kv
        wanted, k, v = (
            split_heads(w(t), self.num_heads) for w, t in ((self.wq, q), (self.wk, tokens), (self.wv, tokens))
        )
        visible = key_mask(mask)
        if self.own_key:
            own = torch.eye(queries, dtype=torch.bool, device=q.device).expand(len(q), 1, queries, queries)
            others = torch.ones((), dtype=torch.bool, device=q.device) if visible is None else visible
            visible = torch.cat([own, others.expand(len(q), 1, queries, kv.shape[1])], -1)

        def core(values: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(
                heads_first(wanted), heads_first(k), heads_first(values), attn_mask=visible
            )
            return out.transpose(1, 2)

        weights = weights_of(core, v) if want_weights else None
        if weights is not None and self.own_key:
            own_weights = weights[..., :queries].diagonal(dim1=2, dim2=3)[..., None]
            weights = torch.cat([own_weights, weights[..., queries:]], -1)
        return core(v).flatten(2), weights

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, queries, tokens = shape
        asked, keys = batch * queries, tokens + self.own_key
        parts = [projection("queries", asked, self.dim, self.dim)]
        if folds(queries, self.num_heads, self.dim, self.dim):
            parts += folded_cost(batch, queries, keys, self.num_heads, self.dim, self.dim)
        else:
            read = batch * tokens + self.own_key * asked
            parts += [
                projection("keys and values", read, self.dim, 2 * self.dim),
                attend("attention", asked, keys, self.dim, read),
            ]
        return [*parts, projection("output", asked, self.dim, self.dim)]


class ItemDropout(DropPath):
    """Stochastic depth that keeps some items, so that the mean over items is that of evaluation."""

    def __init__(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise InputError(f"drop_path={rate} must be at least 0 and less than 1.")
        super().__init__(rate)


class CrossViTBlock(nn.Module):
    """A class token plus what it reads from the other branch's tokens, without an MLP.

    Args:
        dim: channels C.
        num_heads: heads.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        proj_drop: dropout on what is read while training.
        drop_path: probability with which a training item skips the block.
        eps: of the layer normalisation.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = CrossViTAttention(dim, num_heads, qkv_bias, proj_drop=proj_drop)
        self.drop_path = ItemDropout(drop_path)

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        """The class token (B, 1, C) after reading ``patches`` (B, N, C)."""
        return token + self.drop_path(self.attn(self.norm1(token), self.norm1(patches)))


class MultiScaleBlock(nn.Module):
    """Branches of different patch sizes, each with its own encoder, that exchange class tokens (Chen et al. 2021).

    Branch ``i`` sends its class token to branch ``i + 1`` (the last one to the first), where it reads the patches.

    Args:
        dims: channels of each branch.
        num_heads: heads of each branch; a class token reads with those of the branch it visits.
        depths: encoder blocks of each branch and, as one value more, cross-attention blocks of each fusion; 0 there
            means one, as in the released configurations.
        mlp_ratios: inner width of each branch's MLPs, in multiples of its channels; one for the fusion may follow, and
            is of no account.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        proj_drop: dropout on the outputs of attention and MLP while training.
        drop_path: probability with which a training item skips a block.
        eps: of the layer normalisations.
        make_mixer: what mixes a branch's tokens, from its channels and heads; softmax attention when left out.

    Raises:
        InputError: the lists are not as long as there are branches.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_heads: Sequence[int],
        depths: Sequence[int],
        mlp_ratios: Sequence[float],
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        make_mixer: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        count = len(dims)
        if count < 2 or len(num_heads) != count or len(depths) != count + 1 or len(mlp_ratios) < count:
            raise InputError(
                f"the multi-scale block of CrossViT needs at least two branches with as many heads and MLP ratios, and "
                f"one depth more; got dims={list(dims)}, num_heads={list(num_heads)}, depths={list(depths)}, "
                f"mlp_ratios={list(mlp_ratios)}."
            )
        make = make_mixer or (lambda dim, heads: SoftmaxAttention(dim, heads, qkv_bias, proj_drop))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(_EncoderBlock(dim, make(dim, heads), ratio, proj_drop, drop_path, eps) for _ in range(depth))
            )
            for dim, heads, depth, ratio in zip(dims, num_heads, depths[:-1], mlp_ratios, strict=False)
        )
        visited = [(branch + 1) % count for branch in range(count)]
        self.projs = nn.ModuleList(_change_width(dims[i], dims[j], eps) for i, j in enumerate(visited))
        self.fusion = nn.ModuleList(
            nn.ModuleList(
                CrossViTBlock(dims[j], num_heads[j], qkv_bias, proj_drop, drop_path, eps)
                for _ in range(max(depths[-1], 1))
            )
            for j in visited
        )
        self.revert_projs = nn.ModuleList(_change_width(dims[j], dims[i], eps) for i, j in enumerate(visited))

    def forward(self, branches: Sequence[Tensor]) -> list[Tensor]:
        """The tokens (B, 1 + N_i, C_i) of each branch, the class token first, in and out."""
        encoded = [block(tokens) for block, tokens in zip(self.blocks, branches, strict=True)]
        out = []
        for branch, tokens in enumerate(encoded):
            patches = encoded[(branch + 1) % len(encoded)][:, 1:]
            token = self.projs[branch](tokens[:, :1])
            fusion = self.fusion[branch]
            assert isinstance(fusion, nn.ModuleList)
            for block in fusion:
                token = block(token, patches)
            out.append(torch.cat([self.revert_projs[branch](token), tokens[:, 1:]], 1))
        return out

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state, where a fusion of one block has no number for it."""
        renamed = {}
        for key, value in state.items():
            parts = key.split(".")
            if parts[0] == "fusion" and not parts[2].isdigit():
                parts.insert(2, "0")
            renamed[".".join(parts)] = value
        return renamed


class _EncoderBlock(nn.Module):
    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop: float, drop_path: float, eps: float) -> None:
        super().__init__()
        inner = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = mixer
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, inner))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("drop1", nn.Dropout(drop))
        self.mlp.add_module("fc2", nn.Linear(inner, dim))
        self.mlp.add_module("drop2", nn.Dropout(drop))
        self.drop_path = ItemDropout(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _change_width(inputs: int, outputs: int, eps: float) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(inputs, eps=eps), nn.GELU(), nn.Linear(inputs, outputs))
