"""Attention of every region of a map to the tokens of the few regions that are most like it.

Source: Zhu et al., BiFormer: Vision Transformer with Bi-Level Routing Attention, CVPR 2023, arXiv 2303.08810. Both
forms of the released code are here, and the full attention of the models' last stage. The released code refuses maps
that its regions do not divide or fills them with zeros that are seen; by default they are not seen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, depthwise, projection
from attention.depthwise import DepthwiseConv2d
from attention.layout import heads_first, heads_last, split_heads, to_channels_first, to_channels_last, weights_of
from attention.masking import blank, hide_keys, key_mask
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.region_pooling import POOLINGS, check_pooling, pool_regions, region_means
from attention.registry import register
from attention.window import two_sides, weights_on_map
from kernels.bi_level_routing_attention import bi_level_routing_attention
from kernels.bi_level_routing_attention.regions import Regions
from kernels.errors import InputError, unknown_name
from kernels.operators import precisely

FORMS = ("legacy", "refactored")
ROUTINGS = ("hard", "soft", "differentiable", "learned")
PADDINGS = ("hide", "released", "error")
SMALL_MAPS = ("adapt", "error")


@register("bi_level_routing", kind="mixer")
class BiLevelRoutingAttention(Mixer):
    """Bi-level routing attention (BiFormer, Zhu et al. 2023).

    The mean query of a region is compared with the mean keys of all regions; the queries of the region attend to the T
    tokens of the ``topk`` best. All heads share the choice. No parameter depends on ``regions`` or ``topk``.

    Args:
        dim: channels C; heads of the paper are 32 wide, and the released dense form has 8.
        num_heads: heads; they divide ``qk_dim`` as well.
        regions: regions along both axes, or (down, across).
        topk: regions that each is routed to: 1, 4 and 16 in the first three stages of the paper.
        form: ``"legacy"``, of the published models: sides of regions are rounded up. ``"refactored"``: rounded down,
            so that there may be more regions than asked for. On maps that the regions divide they are the same.
        dense: full attention instead, as in the last stage of the published models; what concerns regions and keys is
            of no account then. The ``legacy`` form takes the positional convolution of the input instead of the values.
        qk_dim: channels of queries and keys; C when left out.
        scale: of scores, for routing and attention; ``qk_dim ** -0.5`` when left out, with the channels of all heads
            as the released code has it (of one head where ``dense``).
        lepe_kernel: side of the depthwise convolution of the values that is added to the output; 0 for none.
        kv_pooling: what keys and values of a region are reduced by: ``"identity"``, ``"average"`` and ``"max"`` of
            squares, ``"adaptive_average"`` and ``"adaptive_max"`` to squares.
        kv_pooling_size: side of the squares.
        routing: ``"hard"``: the chosen regions are read as they are. ``"soft"``: their keys and values are multiplied
            by the softmax of the chosen similarities; ``"differentiable"``: which has a gradient as well;
            ``"learned"``: of means that go through a linear layer first. All but ``"hard"`` copy the keys ``topk``
            times.
        qkv_bias: whether the projection to queries, keys and values has a bias; not so in the released dense form
            ``"legacy"``.
        out_proj: whether there is an output projection.
        padding: for maps that regions do not divide. ``"hide"``: what sticks out is not seen. ``"released"``: zeros are
            seen there, put in before the projection (``legacy``, with ``auto_pad``) or after it (``refactored``).
            ``"error"``: such maps are refused.
        small_maps: for maps with fewer tokens along an axis than ``regions``, or fewer regions than ``topk``, and
            regions smaller than a pooling square. ``"adapt"``: as many as there are. ``"error"``: they are refused.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: an option is not known or not possible.
    """

    about = About("Zhu et al. (BiFormer), CVPR 2023, 2303.08810", "O(N T)", "bi_level_routing_attention", "MIT")
    takes_choices = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        regions: int | Sequence[int] = 7,
        topk: int = 4,
        form: str = "legacy",
        dense: bool = False,
        qk_dim: int | None = None,
        scale: float | None = None,
        lepe_kernel: int = 5,
        kv_pooling: str = "identity",
        kv_pooling_size: int = 1,
        routing: str = "hard",
        qkv_bias: bool = True,
        out_proj: bool = True,
        padding: str = "hide",
        small_maps: str = "adapt",
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        for option, value, known in (
            ("form", form, FORMS),
            ("kv_pooling", kv_pooling, POOLINGS),
            ("routing", routing, ROUTINGS),
            ("padding", padding, PADDINGS),
            ("small_maps", small_maps, SMALL_MAPS),
        ):
            if value not in known:
                raise unknown_name(f"attention '{self.name}': {option}", value, known)
        self.regions = two_sides(self.name, "regions", regions)
        self.qk_dim = dim if qk_dim is None or dense else qk_dim
        if not 1 <= topk <= math.prod(self.regions):
            raise self._error(f"topk={topk} must be from 1 to the {math.prod(self.regions)} regions")
        if self.qk_dim < 1 or self.qk_dim % num_heads:
            raise self._error(f"qk_dim={qk_dim} must be a multiple of num_heads={num_heads}")
        if lepe_kernel < 0 or (lepe_kernel and lepe_kernel % 2 == 0):
            raise self._error(f"lepe_kernel={lepe_kernel} must be odd, or 0 for none")
        if kv_pooling_size < 1:
            raise self._error(f"kv_pooling_size={kv_pooling_size} must be at least 1")
        if scale is not None and scale <= 0:
            raise self._error(f"scale={scale} must be positive")
        self.topk, self.form, self.dense, self.routing = topk, form, dense, routing
        self.pooling = ("identity", 1) if kv_pooling == "identity" else (kv_pooling, kv_pooling_size)
        self.padding, self.small_maps = padding, small_maps
        self.scale = scale if scale is not None else (self.head_dim if dense else self.qk_dim) ** -0.5
        self.qkv = nn.Linear(dim, 2 * self.qk_dim + dim, bias=qkv_bias)
        self.router = nn.Linear(self.qk_dim, self.qk_dim) if routing == "learned" and not dense else None
        self.lepe = DepthwiseConv2d(dim, lepe_kernel) if lepe_kernel else None
        self.proj = nn.Linear(dim, dim) if out_proj else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        height, width = x.shape[1:3]
        x, mask = self._extended(x, mask)
        q, k, v = self._qkv(x, mask)
        out = self._core(q, k, mask)(split_heads(v, self.num_heads)).flatten(-2)
        if self.lepe is not None:
            positions = x if self.dense and self.form == "legacy" else v
            out = out + to_channels_last(self.lepe(to_channels_first(positions)))
        return self.proj_drop(self.proj(out[:, :height, :width]))

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if "max" in self.pooling[0] and not self.dense:
            raise self._error("maxima of values have no weights between tokens; leave return_attention out")
        grid = tuple(x.shape[1:3])
        x, mask = self._extended(x, mask)
        q, k, v = self._qkv(x, mask)
        core = self._core(q, k, mask)

        def of_values(values: Tensor) -> Tensor:
            return core(values if mask is None else values * mask[..., None, None])

        return weights_on_map(weights_of(of_values, split_heads(v, self.num_heads)), tuple(x.shape[1:3]), grid)

    def route(self, q: Tensor, k: Tensor, mask: Tensor | None, grid: Regions) -> tuple[Tensor, Tensor]:
        """The choice for queries and keys (B, H, W, qk_dim).

        Returns:
            The chosen regions (B, regions, topk), best first, and the softmax of their similarities.
        """
        queries, keys = region_means(q, mask, grid), region_means(k, mask, grid)
        if self.routing in ("hard", "soft"):
            queries, keys = queries.detach(), keys.detach()
        if self.router is not None:
            kind = self.router.weight.dtype
            queries, keys = self.router(queries.to(kind)), self.router(keys.to(kind))
        with precisely(q):
            precise = torch.promote_types(queries.dtype, torch.float32)
            scores = (queries.to(precise) * self.scale) @ keys.to(precise).mT
        if mask is not None:  # a region without real tokens comes after all others
            real = region_means(mask[..., None].to(scores.dtype), None, grid)
            scores = scores.masked_fill(real.mT == 0, torch.finfo(scores.dtype).min)
        if self.small_maps == "error" and self.topk > grid.count:
            raise self._error(f"topk={self.topk} is more than the {grid.count} regions of this map")
        best, chosen = scores.topk(min(self.topk, grid.count), dim=-1)
        return chosen, best.softmax(-1)

    def region_grid(self, height: int, width: int) -> Regions:
        """The regions of a map.

        Raises:
            InputError: the map is too small or not divisible, and such maps are to be refused.
        """
        sides = list(zip((height, width), self.regions, strict=True))
        if self.small_maps == "error" and any(n < count for n, count in sides):
            raise self._error(f"a map of {height} x {width} tokens has fewer than regions={self.regions}")
        if self.padding == "error" and any(n % min(n, count) for n, count in sides):
            raise self._error(
                f"regions={self.regions} do not divide a map of {height} x {width} tokens; take padding='hide'"
            )
        rows, columns = (-(-n // count) if self.form == "legacy" else max(n // count, 1) for n, count in sides)
        return Regions(height, width, rows, columns)

    def _extended(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The map with zeros behind it, where these are seen and go through the projection."""
        if self.dense or self.form != "legacy" or self.padding != "released":
            return x, mask
        if self.small_maps == "error":
            self.region_grid(*x.shape[1:3])
        below, right = (-n % count for n, count in zip(x.shape[1:3], self.regions, strict=True))
        x = F.pad(x, (0, 0, 0, right, 0, below))
        return x, None if mask is None else F.pad(mask, (0, right, 0, below), value=True)

    def _qkv(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (B, H, W, qk_dim), the same, and (B, H, W, C)."""
        q, k, v = blank(self.qkv(x), mask).split([self.qk_dim, self.qk_dim, self.dim], -1)
        return q, k, v

    def _core(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Callable[[Tensor], Tensor]:
        """What maps values (B, H, W, heads, E) to outputs of that shape; they are 0 where masked."""
        queries, keys = split_heads(q, self.num_heads), split_heads(k, self.num_heads)
        if self.dense:
            return lambda values: self._attend_to_all(queries, keys, values, mask)
        grid = self.region_grid(*q.shape[1:3])
        chosen, similarity = self.route(q, k, mask, grid)
        hide = self.padding != "released"
        pooling, size = self.pooling
        if self.small_maps == "error":
            check_pooling(self.name, pooling, size, grid)
        if pooling == "identity" and self.routing == "hard":
            queries, keys = hide_keys(queries, keys, mask, self.scale)
            return lambda values: self._attend(queries, keys, values, grid, grid, chosen, hide)
        seen = mask
        if seen is None and hide and grid.ragged:
            seen = torch.ones(q.shape[:3], dtype=torch.bool, device=q.device)
        keys, key_mask_map, key_grid = pool_regions(keys, seen, grid, pooling, size, hide)

        def pooled(values: Tensor) -> Tensor:
            return pool_regions(values, seen, grid, pooling, size, hide)[0]

        if self.routing == "hard":
            queries, keys = hide_keys(queries, keys, key_mask_map, self.scale)
            return lambda values: self._attend(queries, keys, pooled(values), grid, key_grid, chosen, hide)
        return lambda values: self._attend_softly(
            queries, keys, pooled(values), key_mask_map, grid, key_grid, chosen, similarity
        )

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Regions, key_grid: Regions, chosen: Tensor, hide: bool
    ) -> Tensor:
        return bi_level_routing_attention(
            q,
            k,
            v,
            (grid.rows, grid.columns),
            region_graph=chosen[:, None],
            kv_region_size=(key_grid.rows, key_grid.columns),
            scale=self.scale,
            mask_padding=hide,
        )[0]

    def _attend_softly(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_map: Tensor | None,
        grid: Regions,
        key_grid: Regions,
        chosen: Tensor,
        similarity: Tensor,
    ) -> Tensor:
        """With keys and values multiplied by their region's share of the similarity; the copies are the formula's."""
        items = torch.arange(len(q), device=q.device)[:, None, None]

        def gathered(x: Tensor) -> Tensor:
            """(B, heads, regions, topk, tokens, E)."""
            return key_grid.split(x).transpose(1, 2)[items, chosen].movedim(3, 1)

        share = similarity[:, None, :, :, None, None].to(k.dtype)
        keys, values = ((gathered(x) * share.to(x.dtype)).flatten(3, 4) for x in (k, v))
        allowed = None
        if key_map is not None:
            allowed = gathered(key_map[..., None, None]).flatten(3)[..., None, :]
            allowed = allowed | ~allowed.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(grid.split(q), keys, values, attn_mask=allowed, scale=self.scale)
        return grid.join(out, planes=False)

    def _attend_to_all(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, values = heads_first(q), heads_first(k), heads_first(v)
        out = F.scaled_dot_product_attention(q, k, values, attn_mask=key_mask(mask), scale=self.scale)
        return split_heads(heads_last(out, v.shape[1:3]), self.num_heads)

    def _error(self, fault: str) -> InputError:
        return InputError(f"attention '{self.name}': {fault}.")

    def cost(self, shape: Sequence[int]) -> list[Part]:
        tokens, total = math.prod(shape[1:]), math.prod(shape)
        count = min(math.prod(self.regions), tokens)
        seen = tokens if self.dense else tokens * min(self.topk, count) / count
        parts = [projection("q, k, v", total, self.dim, 2 * self.qk_dim + self.dim)]
        if not self.dense:
            flops = 2 * shape[0] * (tokens + count**2) * self.qk_dim
            parts.append(Part("routing", flops, 2 * (total + shape[0] * count) * self.qk_dim))
        both = self.qk_dim + self.dim
        parts.append(Part("attention", 2 * total * seen * both, 2 * total * both))
        if self.lepe is not None:
            parts.append(depthwise("positions", total, self.dim, math.prod(self.lepe.kernel_size)))
        return [*parts, projection("output", total, self.dim, self.dim)]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """State of either released form: its names, and 1 x 1 convolutions as linear layers."""
        names = {"qkv.qkv": "qkv", "qkv_linear": "qkv", "wo": "proj", "output_linear": "proj", "router.emb": "router"}
        renamed = {}
        for key, value in state.items():
            layer, _, part = key.rpartition(".")
            ours = names.get(layer, layer)
            flat = value.flatten(1) if value.dim() == 4 and ours != "lepe" else value
            renamed[f"{ours}.{part}"] = flat
        return renamed
