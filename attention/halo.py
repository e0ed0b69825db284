"""Softmax attention of blocks of tokens to themselves and a halo around them, with relative positions.

Source: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones (HaloNet), CVPR 2021,
arXiv 2103.12731. The authors released no code; the two forms in use are that of the paper as later implementations have
it, which leaves the padding out of the softmax (``masked``), and that of the trained models of timm (``released``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention.about import About
from attention.cost import Part, attend, projection
from attention.layout import split_heads, weights_of
from attention.masking import blank, hide_keys
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from kernels.errors import InputError, unknown_name

FORMS = ("masked", "released")

# Numbers of keys copied into windows at a time: more are read in several steps, and copied again for the gradient.
_COPIED = 2**24


class HaloLayer(nn.Module):
    """Halo attention from maps (B, H, W, dim) to (B, H / stride, W / stride, dim_out).

    HaloNets have it in place of 3 x 3 convolutions. The map is extended to whole blocks at the bottom and the right.

    Args:
        dim, dim_out: channels in and out.
        num_heads: heads.
        block_size: side b of the blocks of queries.
        halo_size: reach r of their keys beyond the block on each side.
        form: ``"masked"``: what lies outside the map is not seen, scores and their positions are scaled, and there is
            an output projection. ``"released"``: keys and values of 0 are seen there, positions are not scaled, and
            there is no output projection.
        head_dim: width of a head of queries and keys, and in the form ``masked`` of values; ``dim_out / num_heads``
            when left out.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        scale_positions: whether the products of queries and positions are scaled; as the form has it when left out.
        stride: 1 or 2; with 2 every other query is left out along both axes.
        avg_down: average 2 x 2 outputs instead, for stride 2; so it is where the block is of odd size.

    Raises:
        InputError: an option is not known or not possible.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_heads: int,
        block_size: int = 8,
        halo_size: int = 3,
        form: str = "masked",
        head_dim: int | None = None,
        qkv_bias: bool = False,
        scale_positions: bool | None = None,
        stride: int = 1,
        avg_down: bool = False,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise unknown_name("attention 'halo': form", form, FORMS)
        for option, value, least in (("block_size", block_size, 1), ("halo_size", halo_size, 0)):
            if value < least:
                raise InputError(f"attention 'halo': {option}={value} must be at least {least}.")
        if head_dim is not None and head_dim < 1:
            raise InputError(f"attention 'halo': head_dim={head_dim} must be at least 1.")
        if stride not in (1, 2):
            raise InputError(f"attention 'halo': stride={stride} must be 1 or 2.")
        if num_heads < 1 or dim_out % num_heads:
            raise InputError(f"attention 'halo': dim_out={dim_out} is not divisible into num_heads={num_heads} heads.")
        self.num_heads, self.block_size, self.halo_size, self.form = num_heads, block_size, halo_size, form
        self.stride = stride
        self.averages = stride > 1 and (avg_down or block_size % stride != 0)
        self.query_step = 1 if self.averages else stride
        self.window = block_size + 2 * halo_size
        self.head_dim = head_dim or dim_out // num_heads
        self.value_dim = self.head_dim if form == "masked" else dim_out // num_heads
        self.scale = self.head_dim**-0.5
        scaled = form == "masked" if scale_positions is None else scale_positions
        self.position_factor = 1.0 if scaled else 1 / self.scale  # all scores are multiplied by the scale afterwards
        self.q = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, num_heads * (self.head_dim + self.value_dim), bias=qkv_bias)
        self.height_rel = nn.Parameter(torch.randn(2 * self.window - 1, self.head_dim) * self.scale)
        self.width_rel = nn.Parameter(torch.randn(2 * self.window - 1, self.head_dim) * self.scale)
        self.proj = nn.Linear(num_heads * self.value_dim, dim_out) if form == "masked" else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within ``x`` (B, H, W, dim), whose masked tokens are not seen; ``mask`` is (B, H, W), true if real.

        Raises:
            InputError: the stride does not divide the map.
        """
        if any(n % self.stride for n in x.shape[1:3]):
            raise InputError(f"attention 'halo': stride={self.stride} does not divide a map of {tuple(x.shape[1:3])}.")
        core, v = self.prepared(x, mask)
        out = self.proj(core(v).flatten(-2))
        if self.averages:
            out = F.avg_pool2d(out.movedim(-1, 1), self.stride).movedim(1, -1)
        return out

    def prepared(self, x: Tensor, mask: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """What maps values (B, H, W, heads, E) to outputs, and the values of ``x``."""
        step, before = self.query_step, self.halo_size
        q = split_heads(self.q(x[:, ::step, ::step]), self.num_heads)
        size = q.shape[1:3]
        kv = blank(self.kv(x), mask)
        if self.form == "masked":
            keys, values = kv.split([self.num_heads * self.head_dim, self.num_heads * self.value_dim], -1)
            k, v = split_heads(keys, self.num_heads), split_heads(values, self.num_heads)
        else:
            k, v = split_heads(kv, self.num_heads).split([self.head_dim, self.value_dim], -1)
        blocks = [-(-n // self.block_size) for n in x.shape[1:3]]
        after = [m * self.block_size - n + before for m, n in zip(blocks, x.shape[1:3], strict=True)]
        around = (before, after[1], before, after[0])

        seen = mask
        if self.form == "masked":
            seen = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device) if mask is None else mask
        if seen is not None:
            seen = F.pad(seen, around, value=self.form == "released")
        side = self.block_size // step
        q = F.pad(q, (0, 0, 0, 0, 0, blocks[1] * side - size[1], 0, blocks[0] * side - size[0]))
        positions = self._position_scores(q, side)
        q, k = hide_keys(q, F.pad(k, (0, 0, 0, 0, *around)), seen, self.scale)
        spare = -(q.shape[-1] + positions.shape[-1]) % 8  # widths that fused operators take without a copy
        q = torch.cat([q, F.pad(positions.to(q.dtype), (0, spare))], -1)

        def core(values: Tensor) -> Tensor:
            out = self._attend(q, k, F.pad(values, (0, 0, 0, 0, *around)), side)
            return out[:, : size[0], : size[1]]

        return core, v

    def _position_scores(self, q: Tensor, side: int) -> Tensor:
        """(B, H, W, heads, 2 w): products of each query with the rows and with the columns of its window."""
        cells = q.unflatten(2, (-1, side)).unflatten(1, (-1, side))
        # Sliding windows of a table hold its entries key - query + w - 1 for the keys of a window, last query first.
        down, across = (t.unfold(0, self.window, 1).flip(0)[:side] for t in (self.height_rel, self.width_rel))
        rows = torch.einsum("bnymxhd,ydk->bnymxhk", cells, down)
        columns = torch.einsum("bnymxhd,xdk->bnymxhk", cells, across)
        return torch.cat([rows, columns], -1).flatten(3, 4).flatten(1, 2) * self.position_factor

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, side: int) -> Tensor:
        """Outputs (B, H, W, heads, E) of queries of whole blocks; keys and values reach a halo further.

        A window's copies are as many times larger than its block as the window is; so they are made for some rows of
        blocks at a time.
        """
        q = q.unflatten(2, (-1, side)).unflatten(1, (-1, side))
        k, v = (t.unfold(1, self.window, self.block_size).unfold(2, self.window, self.block_size) for t in (k, v))
        row = k[:, 0].numel() // k.shape[4] * q.shape[-1]
        rows = max(1, _COPIED // max(row, 1))
        if rows >= q.shape[1]:
            return self._attend_rows(q, k, v)
        parts = []
        for start in range(0, q.shape[1], rows):
            part = q[:, start : start + rows], k[:, start : start + rows], v[:, start : start + rows]
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._attend_rows, *part, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._attend_rows(*part))
        return torch.cat(parts, 1)

    def _attend_rows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of queries (B, n, side, m, side, heads, at least D + 2 w) and windows (B, n, m, heads, D or E, w, w)."""
        batch, n, side, m, _, heads, _ = q.shape
        queries = q.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch * n * m, heads, side * side, q.shape[-1])
        keys, values = (t.flatten(5).mT.flatten(0, 2) for t in (k, v))
        # Channels that say in which row and column of its window a key is: they pick the query's score of that place.
        place = torch.eye(self.window, dtype=k.dtype, device=k.device)
        place = torch.cat([place.repeat_interleave(self.window, 0), place.repeat(self.window, 1)], -1)
        place = F.pad(place, (0, queries.shape[-1] - keys.shape[-1] - place.shape[-1]))
        keys = torch.cat([keys, place.expand(*keys.shape[:2], -1, -1)], -1)
        # Fused operators take values as wide as the keys. On CPUs two products are faster where a gradient is needed.
        width = values.shape[-1]
        if values.is_cuda or not torch.is_grad_enabled():
            values = F.pad(values, (0, max(keys.shape[-1] - width, 0)))
        out = F.scaled_dot_product_attention(queries, keys, values, scale=self.scale)[..., :width]
        out = out.reshape(batch, n, m, heads, side, side, width).permute(0, 1, 4, 2, 5, 3, 6)
        return out.flatten(3, 4).flatten(1, 2)

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """State of timm's layer, or of the masked form's usual implementation."""
        names = {"to_q": "q", "to_kv": "kv", "to_out": "proj", "rel_height": "height_rel", "rel_width": "width_rel"}
        renamed = {}
        for key, value in state.items():
            short = key.removeprefix("pos_embed.").removeprefix("rel_pos_emb.")
            layer, dot, part = short.partition(".")
            renamed[names.get(layer, layer) + dot + part] = value.flatten(1) if value.dim() == 4 else value
        return renamed


@register("halo", kind="mixer")
class HaloAttention(Mixer):
    """Attention of blocks to themselves and a halo around them (HaloNet, Vaswani et al. 2021).

    Maps that blocks do not divide are extended at the bottom and the right; P is the number of tokens of a window.

    Args:
        dim: channels C; heads of the paper are 16 wide.
        num_heads: heads.
        block_size: side of the blocks of queries.
        halo_size: reach of their keys beyond the block on each side.
        form: ``"masked"`` or ``"released"``, see :class:`HaloLayer`, whose stride is not for mixers.
        head_dim: width of a head of queries and keys; ``dim / num_heads`` when left out.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        scale_positions: whether products with positions are scaled; as the form has it when left out.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: an option is not known or not possible.
    """

    about = About("Vaswani et al. (HaloNet), CVPR 2021, 2103.12731", "O(N P)", "sdpa", "none released")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        block_size: int = 8,
        halo_size: int = 3,
        form: str = "masked",
        head_dim: int | None = None,
        qkv_bias: bool = False,
        scale_positions: bool | None = None,
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        self.layer = HaloLayer(
            dim, dim, num_heads, block_size, halo_size, form, head_dim, qkv_bias, scale_positions=scale_positions
        )
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        out: Tensor = self.proj_drop(self.layer(x, mask))
        return out

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        core, v = self.layer.prepared(x, mask)
        if mask is None:
            return weights_of(core, v)
        return weights_of(lambda values: core(values * mask[..., None, None]), v)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        total, layer = math.prod(shape), self.layer
        width, values = self.num_heads * layer.head_dim, self.num_heads * layer.value_dim
        parts = [
            projection("q", total, self.dim, width),
            projection("k, v", total, self.dim, width + values),
            Part("positions", 4 * total * layer.window * width, total * width + 2 * layer.height_rel.numel()),
            attend("attention", total, layer.window**2, (width + values) // 2, total),
        ]
        return parts if layer.form == "released" else [*parts, projection("output", total, values, self.dim)]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """State of timm's layer, or of the masked form's usual implementation."""
        return {f"layer.{key}": value for key, value in HaloLayer.checkpoint_filter(state).items()}
