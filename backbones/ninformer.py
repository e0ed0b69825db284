"""NiNformer: a transformer whose token mixing is a gate that an MLP-Mixer generates.

Abdullah and Aydin: NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function, 2024,
arXiv:2403.02411. The authors' code is under the BSD 3-clause licence; no weights have been released.

| name | pixels | patch | width | hidden | blocks | dropout | parameters |
|---|---|---|---|---|---|---|---|
| ninformer_patch4_32 | 32 | 4 | 256 | 512 | 4 | 0.5 | 2.7 M |

The variant is the one of the authors' experiments on CIFAR-10. One LayerNorm serves both branches of a block, there is
none behind the last block and no position encoding. The released network takes its one image size; here the layers
that mix tokens are interpolated for others (see :mod:`attention.ninformer`), images are extended with zeros to whole
patches, and ``drop_path_rate``, which the paper does not have, leaves out whole blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from attention.ninformer import NiNBlock
from backbones.four_stages import Size, build, chosen_mixers, describe, drop_path_rates, stage_grids, taking_masks
from backbones.isotropic import IsotropicNetwork, Tokens
from backbones.weights import rename_within, unwrapped
from kernels.errors import InputError

__all__ = ["NiNformer", "checkpoint_filter_fn"]


class NiNformer(IsotropicNetwork):
    """Network in Network Transformer; see :class:`backbones.isotropic.IsotropicNetwork`.

    Args:
        attention: a mixer in the place of the gating unit, or a list with this one entry.
        embed_dim, hidden_dim, depth: channels, inner width of all MLPs, blocks.
        num_heads: offered to chosen mixers; the gating unit has none.
        proj_drop_rate: dropout behind each layer of the MLPs, the published 0.5 by default.
        img_size: image size, one number or (height, width), for which the layers that mix tokens are built.

    Raises:
        InputError: a choice or a size is not possible.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        attention: Any = None,
        embed_dim: int = 256,
        hidden_dim: int = 512,
        depth: int = 4,
        num_heads: int = 8,
        patch_size: int = 4,
        img_size: Size = 32,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.5,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if depth < 1 or patch_size < 1:
            raise InputError(f"ninformer: depth={depth} and patch_size={patch_size} must be at least 1.")
        grid = stage_grids(img_size, [patch_size])[0]
        choice = chosen_mixers(attention, 1)[0]
        rates = drop_path_rates(drop_path_rate, [depth])[0]
        blocks = []
        for index in range(depth):
            block = NiNBlock(embed_dim, grid, hidden_dim, proj_drop_rate)
            if choice is not None:
                mixer = choice.build(embed_dim, index, num_heads=num_heads, input_size=grid)
                block.mgu = taking_masks(mixer)  # type: ignore[assignment]
            blocks.append(block)
        super().__init__(
            nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size),
            blocks,
            nn.Identity(),
            embed_dim,
            patch_size,
            grid=grid,
            pos_embed=False,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.drop_paths = nn.ModuleList(DropPath(rate) if rate > 0 else nn.Identity() for rate in rates)
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def step(self, index: int, block: nn.Module, tokens: Tokens) -> Tokens:
        x = tokens.x.unflatten(1, tokens.grid)
        out = block(x)
        drop = self.drop_paths[index]
        if not isinstance(drop, nn.Identity):
            out = x + drop(out - x)
        return Tokens(out.flatten(1, 2), tokens.grid)


# Released names of layers outside the blocks, and ours.
_RENAMED = ((r"^patcher\.", "patch_embed."), (r"^model\.(\d+)\.", r"blocks.\1."), (r"^classifier\.", "head.fc."))


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights out of a training checkpoint, from the released names to ours; ours pass through unchanged."""
    plain = unwrapped(state)
    if not any(key.startswith("patcher.") for key in plain):
        return plain
    for official, ours in _RENAMED:
        plain = {re.sub(official, ours, key): value for key, value in plain.items()}
    for name, block in model.named_modules():
        if isinstance(block, NiNBlock):
            plain = rename_within(plain, f"{name}.", block.checkpoint_filter)
    return plain


default_cfgs = generate_default_cfgs(
    {
        "ninformer_patch4_32": describe(
            "patch_embed",
            "bsd-3-clause",
            num_classes=10,
            input_size=(3, 32, 32),
            pool_size=(8, 8),
            crop_pct=1.0,
            paper_ids="arXiv:2403.02411",
            origin_url="https://github.com/Abdullah-88/NiNformer",
        )
    }
)


@register_model
def ninformer_patch4_32(pretrained: bool = False, attention: Any = None, **kwargs: Any) -> nn.Module:
    """The network of the CIFAR-10 experiments."""
    own = {"attention": attention}
    return build(NiNformer, "ninformer_patch4_32", pretrained, checkpoint_filter_fn, own, kwargs)
