"""Attention within blocks of neighbouring tokens, within grids of distant ones, and one after the other.

Source: Tu et al., MaxViT: Multi-Axis Vision Transformer, ECCV 2022, arXiv 2204.01697. The released code takes only maps
that the partition divides; here what sticks out at the bottom and the right of others is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, elementwise
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from attention.window import WindowAttention
from kernels.errors import unknown_name
from kernels.window_attention import relative_position_bias, window_attention

DIALECTS = {"torch": "maxvit", "tf": "maxvit_tf"}


class PartitionAttention(WindowAttention):
    """Attention within the parts of a partition of the map, with relative position bias: base of blocks and grids."""

    kind_of_window: ClassVar[str]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        dialect: str = "torch",
        relative_bias: bool = True,
        qkv_bias: bool = True,
        padding: str = "hide",
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, window_size, 0, relative_bias, qkv_bias, padding, proj_drop)
        if dialect not in DIALECTS:
            raise unknown_name(f"attention '{self.name}': dialect", dialect, DIALECTS)
        self.dialect = dialect
        if relative_bias and dialect == "tf":
            h, w = self.window_size
            self.relative_position_bias_table = nn.Parameter(torch.empty(num_heads, 2 * h - 1, 2 * w - 1))
            nn.init.normal_(self.relative_position_bias_table, std=0.02)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.dialect == "tf":
            return super()._split(qkv)
        q, k, v = qkv.unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(-2)
        return q, k, v

    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        table, layout = self.relative_position_bias_table, DIALECTS[self.dialect]
        out = window_attention(
            q,
            k,
            v,
            self.window_size,
            kind=self.kind_of_window,
            bias=None if table is None else relative_position_bias(table, self.window_size, layout),
            scale=self.head_dim**-0.5,
            padding="hide",
        )
        assert isinstance(out, Tensor)
        return out

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """State of timm's attention layer, whose table lies in a module of its own."""
        kept = {key.removeprefix("rel_pos."): value for key, value in state.items()}
        kept.pop("relative_position_index", None)
        return kept


@register("block", kind="mixer")
class BlockAttention(PartitionAttention):
    """Attention within blocks of neighbouring tokens, without shift (MaxViT, Tu et al. 2022).

    Args:
        dim: channels C; heads of the paper are 32 wide.
        num_heads: heads.
        window_size: side of a block, or (height, width); P is the number of its tokens. The paper takes a 32nd of the
            image's side.
        dialect: whose weights these are: ``"torch"`` fuses queries, keys and values head by head and has a table of
            query minus key; ``"tf"``, the authors' own, fuses all queries, all keys, all values and has one of key
            minus query.
        relative_bias: whether scores have a learned bias by offset.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        padding: for maps that blocks do not divide. ``"hide"``: what sticks out is not seen. ``"released"``: the map is
            extended with zeros before the projection and they are seen, as when images are padded by hand.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: the window is not possible, or an option is not known.
    """

    about = About("Tu et al. (MaxViT), ECCV 2022, 2204.01697", "O(N P)", "window_attention", "Apache-2.0")
    kind_of_window = "window"


@register("grid", kind="mixer")
class GridAttention(PartitionAttention):
    """Attention within grids of tokens that lie far apart, one in each cell of the map (MaxViT, Tu et al. 2022).

    A grid takes ``window_size`` tokens at equal distances along each axis, so that its span is that of the whole map
    whatever the map's size.

    Args:
        dim: channels C; heads of the paper are 32 wide.
        num_heads: heads.
        window_size: tokens of a grid along both axes, or (down, across); P is their number.
        dialect: see :class:`BlockAttention`.
        relative_bias: whether scores have a learned bias by offset, counted in steps of the grid.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        padding: see :class:`BlockAttention`.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: the window is not possible, or an option is not known.
    """

    about = About("Tu et al. (MaxViT), ECCV 2022, 2204.01697", "O(N P)", "window_attention", "Apache-2.0")
    kind_of_window = "grid"


@register("multi_axis", kind="mixer")
class MultiAxisAttention(Mixer):
    """Block attention and then grid attention, near and far in one mixer (MaxViT, Tu et al. 2022).

    With ``b = block(x)`` the output is ``b + grid(norm(x + b))``: under the host's residual the two are the paper's two
    residual steps, each with projections of its own. The paper's two-layer network between them is left to the host,
    and the first step's residual is the host's normed map.

    Args:
        dim: channels C.
        num_heads: heads, of both.
        window_size: side of a block and of a grid, or (height, width); P is the number of their tokens.
        dialect: see :class:`BlockAttention`.
        relative_bias: whether scores have a learned bias by offset.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        padding: see :class:`BlockAttention`.
        proj_drop: dropout on the output of each while training.

    Raises:
        InputError: the window is not possible, or an option is not known.
    """

    about = About("Tu et al. (MaxViT), ECCV 2022, 2204.01697", "O(N P)", "window_attention", "Apache-2.0")
    has_weights = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        dialect: str = "torch",
        relative_bias: bool = True,
        qkv_bias: bool = True,
        padding: str = "hide",
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        options = (window_size, dialect, relative_bias, qkv_bias, padding, proj_drop)
        self.block = BlockAttention(dim, num_heads, *options)
        # The norms of both dialects: that of the authors' own weights and that of models trained with PyTorch.
        self.norm = nn.LayerNorm(dim, eps=1e-5 if dialect == "tf" else 1e-6)
        self.grid = GridAttention(dim, num_heads, *options)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        near = self.block(x, mask)
        far = self.grid(self.norm(x + near), mask)
        out: Tensor = near + far
        return out

    def cost(self, shape: Sequence[int]) -> list[Part]:
        between = elementwise("norm between", shape[0] * self.dim * shape[1] * shape[2], 3, 8)
        return [*self.block.cost(shape), between, *self.grid.cost(shape)]
