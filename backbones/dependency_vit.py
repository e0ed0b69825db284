"""DependencyViT: a vision transformer of reversed attention, in which a tree of dependencies between tokens emerges.

Ding, Shen, Fan, Chen, Chen, Luo, Tenenbaum, Gan: Visual Dependency Transformers: Dependency Tree Emerges from Reversed
Attention, CVPR 2023, arXiv:2304.03282. The authors' repository holds an MIT licence and neither code nor weights.

| name | width | blocks | heads | parameters here |
|---|---|---|---|---|
| dependencyvit_tiny | 192 | 12 | 12 | 6.0 M |
| dependencyvit_small | 384 | 12 | 12 | 23.0 M |

Established: reversed attention (:mod:`attention.reversed`), whose message passes from layer to layer; widths, blocks,
heads; no class token, but the mean of all tokens, each times its message; and for the Lite networks that tokens which
send the least leave behind blocks 2, 5, 8 and 11, 16 % each time. Not established, and chosen here: patches of 16
pixels, learned positions, pre-norm blocks with MLPs of four times the width and LayerNorms of epsilon 1e-6, one more
behind the last block; no biases in queries, keys, values, head selector and message controller; that the 16 % are of
the tokens still there; and that tokens which have left count as nothing in the mean and keep in maps what they last
were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from attention.reversed import ReversedAttention
from backbones.four_stages import Size, build, chosen_mixers, describe, drop_path_rates, stage_grids
from backbones.isotropic import IsotropicNetwork, Tokens, with_positions_resized
from backbones.weights import unwrapped
from kernels.errors import InputError

__all__ = ["DependencyViT", "checkpoint_filter_fn"]

LITE_BLOCKS = (2, 5, 8, 11)


class DependencyViT(IsotropicNetwork):
    """Visual Dependency Transformer; see :class:`backbones.isotropic.IsotropicNetwork`.

    ``forward_features`` gives the map of the normalised tokens, each times its message.

    Args:
        attention: a mixer in the place of reversed attention, or a list with this one entry; then there are no
            messages.
        embed_dim, depth, num_heads: channels, blocks, heads.
        lite: whether tokens leave on the way.
        prune_after: numbers, from 1 on, of the blocks behind which they do.
        prune_share: share of the tokens still there that leaves, each time.
        mlp_ratio: hidden channels of the MLPs, over the width.
        img_size: image size, one number or (height, width), for which positions and tables of mixers are built.

    Raises:
        InputError: a choice or a size is not possible, or tokens are to leave with another attention.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        attention: Any = None,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 12,
        lite: bool = False,
        prune_after: Sequence[int] = LITE_BLOCKS,
        prune_share: float = 0.16,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        img_size: Size = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if depth < 1 or patch_size < 1:
            raise InputError(f"dependencyvit: depth={depth} and patch_size={patch_size} must be at least 1.")
        if not 0 <= prune_share < 1:
            raise InputError(f"dependencyvit: prune_share={prune_share} must be from 0 to less than 1.")
        choice = chosen_mixers(attention, 1)[0]
        if lite and choice is not None:
            raise InputError("dependencyvit: lite=true needs the messages of reversed attention; leave attention out.")
        grid = stage_grids(img_size, [patch_size])[0]
        rates = drop_path_rates(drop_path_rate, [depth])[0]
        blocks = []
        for index in range(depth):
            attn: nn.Module = ReversedAttention(embed_dim, num_heads)
            if choice is not None:
                attn = choice.build(embed_dim, index, num_heads=num_heads, input_size=grid)
            blocks.append(Block(embed_dim, attn, mlp_ratio, rates[index]))
        super().__init__(
            nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size),
            blocks,
            nn.LayerNorm(embed_dim, eps=1e-6),
            embed_dim,
            patch_size,
            grid=grid,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.prune_after = frozenset(prune_after) if lite else frozenset()
        self.prune_share = prune_share
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def step(self, index: int, block: nn.Module, tokens: Tokens) -> Tokens:
        x, message = block(tokens.x, tokens.grid, tokens.extras.get("message"))
        extras = dict(tokens.extras) if message is None else tokens.extras | {"message": message}
        after = Tokens(x, tokens.grid, extras)
        return self._pruned(after) if index + 1 in self.prune_after else after

    def _pruned(self, tokens: Tokens) -> Tokens:
        """Without the tokens of the smallest messages, which are what a token sends over all heads and parents."""
        message = tokens.extras["message"]
        kept = message.shape[1] - int(self.prune_share * message.shape[1])
        chosen = message.topk(kept, dim=1).indices.sort(dim=1).values
        extras = {
            "message": message.gather(1, chosen),
            # Where the tokens that stay are in the map, and all tokens as they last were.
            "places": tokens.extras["places"].gather(1, chosen) if "places" in tokens.extras else chosen,
            "last": self._all(tokens),
        }
        x = tokens.x.gather(1, chosen[..., None].expand(-1, -1, tokens.x.shape[2]))
        return Tokens(x, tokens.grid, extras)

    def _all(self, tokens: Tokens) -> Tensor:
        """(B, H * W, C), those that have left as they last were."""
        if "places" not in tokens.extras:
            return tokens.x
        places = tokens.extras["places"][..., None].expand_as(tokens.x)
        return tokens.extras["last"].to(tokens.x.dtype).scatter(1, places, tokens.x)

    def map_of(self, tokens: Tokens) -> Tensor:
        return super().map_of(Tokens(self._all(tokens), tokens.grid))

    def finish(self, tokens: Tokens) -> Tensor:
        x = self.norm(tokens.x)
        message = tokens.extras.get("message")
        if message is not None:
            x = x * message[..., None].to(x.dtype)
        extras = dict(tokens.extras)
        if "last" in extras:
            extras["last"] = torch.zeros_like(extras["last"])
        return self.map_of(Tokens(x, tokens.grid, extras))

    def dependencies(self, x: Tensor) -> list[Tensor]:
        """Dependency masks (B, N, N) of each block for images: how much token j (row) is a parent of token i (column).

        The root of an image's tree is the row with the largest sum.

        Raises:
            InputError: attention is not reversed, or tokens leave on the way.
        """
        tokens = self.embed(x)
        masks = []
        for index, block in enumerate(self.blocks):
            attn = block.attn
            if not isinstance(attn, ReversedAttention) or self.prune_after:
                raise InputError("dependencies are of reversed attention without lite=true; build it so.")
            normed = block.norm1(tokens.x)  # type: ignore[operator]
            masks.append(attn.dependency(normed, message=tokens.extras.get("message")))
            tokens = self.step(index, block, tokens)
        return masks


class Block(nn.Module):
    """Pre-norm block of tokens (B, N, C) that hands the message on."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int], message: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            x: (B, N, C); a mixer that is not reversed attention needs all tokens of the ``grid``.
            message: (B, N) of the block before, None in front of the first.

        Returns:
            (B, N, C), and the message behind this block, None where its attention has none.
        """
        normed = self.norm1(x)
        if isinstance(self.attn, ReversedAttention):
            extras = {} if message is None else {"message": message}
            mixed = self.attn(normed, extras=extras)
            message = extras["message"]
        else:
            mixed = self.attn(normed.unflatten(1, grid)).flatten(1, 2)
        assert isinstance(mixed, Tensor)
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x))), message


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights out of a training checkpoint, with positions of another image size resized. None are published."""
    assert isinstance(model, DependencyViT)
    return with_positions_resized(unwrapped(state), model)


_WIDTHS = {"dependencyvit_tiny": 192, "dependencyvit_small": 384}
default_cfgs = generate_default_cfgs(
    {
        name: describe(
            "patch_embed",
            "mit",
            pool_size=(14, 14),
            paper_ids="arXiv:2304.03282",
            origin_url="https://github.com/dingmyu/DependencyViT",
        )
        for name in _WIDTHS
    }
)


def _build(variant: str, pretrained: bool, given: dict[str, Any]) -> nn.Module:
    own = {"embed_dim": _WIDTHS[variant]}
    return build(DependencyViT, variant, pretrained, checkpoint_filter_fn, own, given)


@register_model
def dependencyvit_tiny(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DependencyViT-T; with ``lite=True`` DependencyViT-Lite-T."""
    return _build("dependencyvit_tiny", pretrained, {"attention": attention, **kwargs})


@register_model
def dependencyvit_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """DependencyViT-S; with ``lite=True`` DependencyViT-Lite-S."""
    return _build("dependencyvit_small", pretrained, {"attention": attention, **kwargs})
