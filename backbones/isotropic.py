"""What networks of one scale have in common, whatever is in them: patches, blocks, timm's contract.

A pyramid for decoders is the tokens at four evenly spaced depths, all at the stride of the patches, as Li et al.,
Exploring Plain Vision Transformer Backbones for Object Detection, ECCV 2022, arXiv 2203.16527, compare it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers.classifier import ClassifierHead
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

import attention as registry
from attention.layout import to_channels_first, to_channels_last
from backbones.four_stages import Classifying, as_indices, only_nchw, padded, undecayed
from backbones.weights import State
from kernels.errors import InputError, unknown_name

LEVELS = 4
POOLS = ("token", "avg", "")


@dataclass
class Tokens:
    """The tokens of an image between two blocks.

    Args:
        x: (B, P + H * W, C), P tokens in front of those of the patches.
        grid: (H, W).
        extras: what blocks hand on beside the tokens.
    """

    x: Tensor
    grid: tuple[int, int]
    extras: dict[str, Tensor] = field(default_factory=dict)


class IsotropicNetwork(Classifying):
    """Patches, blocks at one scale, norm, classifier.

    Images (B, in_chans, H, W) of any size, extended with zeros to whole patches, become logits (B, num_classes). A
    subclass says what a block does with :class:`Tokens` in :meth:`step`, and what becomes of the last ones in
    :meth:`finish`; by default the normalised map (B, C, H / patch, W / patch), which is then averaged.

    Args:
        patch_embed: (B, in_chans, H, W) to (B, C, H / patch, W / patch).
        blocks: in their order.
        norm: of the last tokens (B, N, C).
        dim: channels C.
        patch_size: side of a patch in pixels.
        pos_embed: whether learned positions are added to the tokens, one for each of a ``grid``, resized to others.
        prefix: tokens in front of the patches', learned, with positions of their own.
        global_pool: of the map; ``"avg"``, ``"max"``, or empty for none.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        dim: int,
        patch_size: int,
        *,
        grid: tuple[int, int] = (14, 14),
        pos_embed: bool = True,
        prefix: int = 0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.patch_size, self.grid, self.num_prefix_tokens = patch_size, grid, prefix
        self.grad_checkpointing = False
        depth = len(blocks)
        levels = min(LEVELS, depth)
        self.levels = [-(-(k + 1) * depth // levels) - 1 for k in range(levels)]
        self.feature_info = [{"num_chs": dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in self.levels]
        self.patch_embed = patch_embed
        self.cls_token: nn.Parameter | None = None
        self.pos_embed: nn.Parameter | None = None
        if prefix:
            self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, prefix, dim), std=0.02))
        if pos_embed:
            self.pos_embed = nn.Parameter(
                nn.init.trunc_normal_(torch.empty(1, prefix + math.prod(grid), dim), std=0.02)
            )
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = ClassifierHead(dim, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        if num_classes:
            nn.init.trunc_normal_(self.head.fc.weight, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions and prefix tokens."""
        return undecayed(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for learning rates that decay with depth."""
        blocks: Any = r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping what is inside it."""
        self.grad_checkpointing = enable

    def step(self, index: int, block: nn.Module, tokens: Tokens) -> Tokens:
        """``tokens`` behind ``block``, the one at ``index``."""
        raise NotImplementedError

    def finish(self, tokens: Tokens) -> Tensor:
        """What :meth:`forward_features` gives for the last tokens."""
        return self.map_of(Tokens(self.norm(tokens.x), tokens.grid))

    def map_of(self, tokens: Tokens) -> Tensor:
        """The tokens of the patches as a map (B, C, H, W)."""
        return to_channels_first(tokens.x[:, self.num_prefix_tokens :].unflatten(1, tokens.grid)).contiguous()

    def embed(self, x: Tensor) -> Tokens:
        """The tokens of images (B, in_chans, H, W)."""
        x = self.patch_embed(padded(x, self.patch_size))
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        if self.pos_embed is not None:
            x = x + positions_for(self.pos_embed, self.grid, grid, self.num_prefix_tokens)
        return Tokens(x, grid)

    def _run(self, index: int, block: nn.Module, tokens: Tokens) -> Tokens:
        if not self.grad_checkpointing or not torch.is_grad_enabled():
            return self.step(index, block, tokens)
        names = list(tokens.extras)

        def through(x: Tensor, *values: Tensor) -> tuple[Any, ...]:
            out = self.step(index, block, Tokens(x, tokens.grid, dict(zip(names, values, strict=True))))
            return out.grid, list(out.extras), out.x, *out.extras.values()

        grid, after, x, *values = checkpoint(through, tokens.x, *tokens.extras.values())
        return Tokens(x, grid, dict(zip(after, values, strict=True)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps (B, C, ceil(H / patch), ceil(W / patch)) of the levels ``indices`` (the last n for a number).

        Args:
            norm: normalise every map as the last one is normalised.
            stop_early: leave out the blocks behind the last one asked for.
            intermediates_only: return the list alone, not (``forward_features`` of ``x``, list).

        Raises:
            InputError: another format than NCHW is asked for.
        """
        only_nchw(output_fmt)
        take, last = feature_take_indices(len(self.levels), as_indices(indices))
        wanted = [self.levels[i] for i in take]
        maps = []
        tokens = self.embed(x)
        for i, block in enumerate(self.blocks):
            if stop_early and intermediates_only and i > self.levels[last]:
                break
            tokens = self._run(i, block, tokens)
            if i in wanted:
                found = self.map_of(tokens)
                maps.append(to_channels_first(self.norm(to_channels_last(found))).contiguous() if norm else found)
        return maps if intermediates_only else (self.finish(tokens), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks that the levels ``indices`` do not need, in place, and return the levels' numbers."""
        take, last = feature_take_indices(len(self.levels), as_indices(indices))
        self.blocks = self.blocks[: self.levels[last] + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        for i, block in enumerate(self.blocks):
            tokens = self._run(i, block, tokens)
        return self.finish(tokens)


class TokenHead(nn.Module):
    """The part of a network that classifies tokens (B, 1 + N, C) by the first of them, or by the mean of the others."""

    head: nn.Module
    head_drop: nn.Module
    num_features: int
    num_classes: int
    global_pool: str

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; 0 classes for none, an empty ``global_pool`` for all tokens.

        Raises:
            InputError: the pooling is none of ``"token"``, ``"avg"`` and empty.
        """
        if global_pool is not None:
            if global_pool not in POOLS:
                raise unknown_name("global_pool", global_pool, POOLS)
            self.global_pool = global_pool
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, 1:].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


class BesidePrefix(nn.Module):
    """Any mixer of maps for the patch tokens, and a cross attention by which the class token reads the mixed ones."""

    def __init__(self, mixer: nn.Module, dim: int, num_heads: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.reader = registry.create("cross", kind="cross", dim=dim, num_heads=num_heads)

    def on_grid(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, 1 + H * W, C) to the same."""
        mixed = self.mixer(x[:, 1:].unflatten(1, grid)).flatten(1, 2)
        tokens = torch.cat((x[:, :1], mixed), dim=1)
        return torch.cat((self.reader(x[:, :1], tokens), mixed), dim=1)


def positions_for(table: Tensor, trained: tuple[int, int], grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """Learned positions (1, prefix + H * W, C) of a ``trained`` grid for another, bicubically."""
    if grid == trained:
        return table
    return resample_abs_pos_embed(table, list(grid), list(trained), num_prefix_tokens=prefix, antialias=False)


def with_positions_resized(state: State, model: IsotropicNetwork) -> State:
    """``state`` with ``pos_embed`` of another square of patches fitted to the model's grid."""
    table = state.get("pos_embed")
    if table is None or model.pos_embed is None or table.shape == model.pos_embed.shape:
        return state
    patches = table.shape[1] - model.num_prefix_tokens
    side = math.isqrt(max(patches, 0))
    if side**2 != patches:
        raise InputError(f"pos_embed of {patches} patches is of no square image, and cannot be resized.")
    return state | {"pos_embed": positions_for(table, (side, side), model.grid, model.num_prefix_tokens)}
