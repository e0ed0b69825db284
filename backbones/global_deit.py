"""DeiT with global attention of linear cost: Agent-DeiT and InLine-DeiT.

Han, Ye, Han, Xia, Pan, Wan, Song, Huang: Agent Attention: On the Integration of Softmax and Linear Attention, ECCV
2024, arXiv:2312.08874. Han, Pu, Xia, Han, Pan, Li, Lu, Song, Huang: Bridging the Divide: Reconsidering Softmax and
Linear Attention (InLine), NeurIPS 2024, arXiv:2412.06590. The layout is that of Touvron et al., DeiT, ICML 2021,
arXiv:2012.12877. The authors' codes name no licence, and none for the weights: nothing of either is here.

| name | pixels | width | heads | agents | parameters | FLOPs | ImageNet top-1 (%) |
|---|---|---|---|---|---|---|---|
| agent_deit_tiny | 224 | 192 | 3 | 49 | 6.0 M | 1.2 G | 74.9 |
| agent_deit_small | 224 | 384 | 6 | 49 | 22.7 M | 4.4 G | 80.5 |
| agent_deit_base | 224 | 768 | 12 | 81, in the first 4 blocks | 87.2 M | 17.6 G | 82.0 |
| inline_deit_tiny | 224 | 192 | 6 | - | 6.5 M | 1.1 G | 74.5 |
| inline_deit_small | 288 | 320 | 10 | - | 16.7 M | 5.0 G | 80.2 |
| inline_deit_base | 448 | 384 | 12 | - | 23.8 M | 17.2 G | 82.3 |

Numbers are the authors'; of agent_deit_small 22.65 million parameters are counted here. All have 12 blocks, patches of
16 pixels and a class token. Not stated where the numbers are, and inferred from the published parameters, which are
then met to the last digit: that agent_deit_base has softmax attention in its last 8 blocks (with agents in all 12 there
would be 88.5 million), and widths and heads of InLine-DeiT. Images of any size are taken, where the published code
needs the trained one: positions and agents' bias tables are resized, and images are extended with zeros to whole
patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from attention.agent import AgentAttention
from attention.block_parts import depthwise_each
from attention.inline import InLineAttention, inline_core, local_kernels
from attention.layout import heads_last, split_qkv
from attention.softmax import SoftmaxAttention
from backbones.four_stages import Size, build, chosen_mixers, describe, drop_path_rates, stage_grids
from backbones.isotropic import BesidePrefix, IsotropicNetwork, TokenHead, Tokens, with_positions_resized
from backbones.weights import rename_within, unwrapped, with_tables_resized
from kernels.errors import InputError, unknown_name

__all__ = ["GlobalDeiT", "checkpoint_filter_fn"]

MIXERS = ("agent", "inline")


class GlobalDeiT(TokenHead, IsotropicNetwork):
    """DeiT with agent or InLine attention; see :class:`backbones.isotropic.IsotropicNetwork`.

    ``forward_features`` gives the normalised tokens (B, 1 + H * W, C), the class token first.

    Args:
        mixer: of the global blocks, ``"agent"`` or ``"inline"``.
        global_blocks: how many of the first blocks are global; the others have softmax attention.
        attention: a mixer of the patch tokens in the place of both kinds, or a list with this one entry. The class
            token, which such a mixer does not know, then reads the mixed tokens by a cross attention of its own.
        embed_dim, depth, num_heads: channels, blocks, heads.
        agents: their number, a square number; of no account for InLine.
        mlp_ratio: hidden channels of the MLPs, over the width.
        img_size: image size, one number or (height, width), for which positions and bias tables are built.
        global_pool: ``"token"`` for the class token, ``"avg"`` for the mean of the others, empty for all tokens.

    Raises:
        InputError: a choice or a size is not possible.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        mixer: str = "agent",
        global_blocks: int = 12,
        attention: Any = None,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        agents: int = 49,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        img_size: Size = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mixer not in MIXERS:
            raise unknown_name("deit: mixer", mixer, MIXERS)
        if depth < 1 or patch_size < 1:
            raise InputError(f"deit: depth={depth} and patch_size={patch_size} must be at least 1.")
        grid = stage_grids(img_size, [patch_size])[0]
        choice = chosen_mixers(attention, 1)[0]
        rates = drop_path_rates(drop_path_rate, [depth])[0]
        blocks = []
        for index in range(depth):
            attn: nn.Module
            if choice is not None:
                attn = BesidePrefix(
                    choice.build(embed_dim, index, num_heads=num_heads, input_size=grid), embed_dim, num_heads
                )
            elif index >= global_blocks:
                attn = PrefixSoftmax(embed_dim, num_heads)
            elif mixer == "agent":
                attn = PrefixAgent(embed_dim, num_heads, grid, agents, prefix=1)
            else:
                attn = PrefixInLine(embed_dim, num_heads, prefix_tokens=1)
            blocks.append(Block(embed_dim, attn, mlp_ratio, rates[index]))
        super().__init__(
            nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size),
            blocks,
            nn.LayerNorm(embed_dim, eps=1e-6),
            embed_dim,
            patch_size,
            grid=grid,
            prefix=1,
            in_chans=in_chans,
            drop_rate=drop_rate,
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def step(self, index: int, block: nn.Module, tokens: Tokens) -> Tokens:
        return Tokens(block(tokens.x, tokens.grid), tokens.grid)

    def finish(self, tokens: Tokens) -> Tensor:
        return self.norm(tokens.x)


class Block(nn.Module):
    """Pre-norm block of tokens (B, 1 + H * W, C), told their grid."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp.apply(_initialise)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        on_grid = cast("PrefixAgent | PrefixInLine | PrefixSoftmax | BesidePrefix", self.attn).on_grid
        x = x + self.drop_path(on_grid(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PrefixSoftmax(SoftmaxAttention):
    """Softmax attention over all tokens."""

    def on_grid(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        out = self(x)
        assert isinstance(out, Tensor)
        return out


class PrefixAgent(AgentAttention):
    """Agent attention that is told the grid behind the class token, which the number of tokens alone does not say."""

    def on_grid(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, 1 + H * W, C) to the same."""
        q, k, v, _ = self._qkv(x, None)
        out = heads_last(self._core(q, k, v, grid, None, None), (x.shape[1],))
        local = self._local(v[:, self.prefix :].flatten(-2), grid, None).flatten(1, 2)
        return self.proj_drop(self.proj(out + nn.functional.pad(local, (0, 0, self.prefix, 0))))


class PrefixInLine(InLineAttention):
    """InLine attention that is told the grid behind the class token."""

    def on_grid(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, 1 + H * W, C) to the same."""
        assert self.residual is not None
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        kernels = local_kernels(self.residual, x.mean(1))
        local = depthwise_each(v[:, self.prefix_tokens :].flatten(2).unflatten(1, grid), kernels).flatten(1, 2)
        out = inline_core(q, k, v, self.phi).flatten(2)
        return self.proj_drop(self.proj(out + nn.functional.pad(local, (0, 0, self.prefix_tokens, 0))))


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights out of a training checkpoint, from the released names to ours; ours pass through.

    Positions and bias tables of another image size are resized.
    """
    assert isinstance(model, GlobalDeiT)
    renamed = {key.replace("patch_embed.proj.", "patch_embed."): value for key, value in unwrapped(state).items()}
    own = model.state_dict().keys()
    for name, module in model.named_modules():
        if isinstance(module, (AgentAttention, InLineAttention)):
            inside = [key for key in renamed if key.startswith(f"{name}.")]
            if not own >= set(inside):
                renamed = rename_within(renamed, f"{name}.", module.checkpoint_filter)
    return with_positions_resized(with_tables_resized(renamed, model), model)


VARIANTS: dict[str, dict[str, Any]] = {
    "agent_deit_tiny": {"mixer": "agent"},
    "agent_deit_small": {"mixer": "agent", "embed_dim": 384, "num_heads": 6},
    "agent_deit_base": {"mixer": "agent", "embed_dim": 768, "num_heads": 12, "agents": 81, "global_blocks": 4},
    "inline_deit_tiny": {"mixer": "inline", "num_heads": 6},
    "inline_deit_small": {"mixer": "inline", "embed_dim": 320, "num_heads": 10, "img_size": 288},
    "inline_deit_base": {"mixer": "inline", "embed_dim": 384, "num_heads": 12, "img_size": 448},
}

_SOURCES = {
    "agent": {"paper_ids": "arXiv:2312.08874", "origin_url": "https://github.com/LeapLabTHU/Agent-Attention"},
    "inline": {"paper_ids": "arXiv:2412.06590", "origin_url": "https://github.com/LeapLabTHU/InLine"},
}
default_cfgs = generate_default_cfgs(
    {
        name: describe(
            "patch_embed",
            "unknown",
            classifier="head",
            pool_size=None,
            input_size=(3, shape.get("img_size", 224), shape.get("img_size", 224)),
            **_SOURCES[shape["mixer"]],
        )
        for name, shape in VARIANTS.items()
    }
)


def _build(variant: str, pretrained: bool, given: dict[str, Any]) -> nn.Module:
    return build(GlobalDeiT, variant, pretrained, checkpoint_filter_fn, VARIANTS[variant], given)


@register_model
def agent_deit_tiny(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """Agent-DeiT-T."""
    return _build("agent_deit_tiny", pretrained, {"attention": attention, **kwargs})


@register_model
def agent_deit_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """Agent-DeiT-S; published with a drop path rate of 0.1."""
    return _build("agent_deit_small", pretrained, {"attention": attention, **kwargs})


@register_model
def agent_deit_base(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """Agent-DeiT-B; published with a drop path rate of 0.3."""
    return _build("agent_deit_base", pretrained, {"attention": attention, **kwargs})


@register_model
def inline_deit_tiny(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """InLine-DeiT-T."""
    return _build("inline_deit_tiny", pretrained, {"attention": attention, **kwargs})


@register_model
def inline_deit_small(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """InLine-DeiT-S, for 288 pixels."""
    return _build("inline_deit_small", pretrained, {"attention": attention, **kwargs})


@register_model
def inline_deit_base(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """InLine-DeiT-B, for 448 pixels."""
    return _build("inline_deit_base", pretrained, {"attention": attention, **kwargs})
