"""Agent attention: a few agents gather from all tokens by softmax attention, and all tokens read from the agents.

Source: Han et al., Agent Attention: On the Integration of Softmax and Linear Attention, ECCV 2024, arXiv 2312.08874.
The paper's forms for DeiT (``prefix=1``), PVT (``sr_ratio``), Swin, and detection and segmentation (``agent_grid``) are
parameters here; the one for the stripes of CSWin is :class:`attention.agent_stripes.StripeAgentAttention`.

Where the released code stops: maps that ``sr_ratio`` does not divide are extended with zeros; volumes have one more
table, for the depth. Sequences (an ``input_size`` of one axis), of which the paper does not speak, have no neighbours
and no agents to pool: theirs are learned, without biases and without the depthwise convolution, so that the order of
the tokens is of no account.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.agent_bias import AgentBias, attend_agents
from attention.cost import Part, attend, depthwise, projection
from attention.layout import heads_first, heads_last, split_heads, to_channels_first, to_channels_last, weights_of
from attention.masked_mean import adaptive_mean
from attention.masking import blank
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.prefix import grid_behind
from attention.registry import register
from attention.resizing import resize
from kernels.errors import InputError
from kernels.varlen_attention import varlen_attention

_CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


@register("agent", kind="mixer")
class AgentAttention(Mixer):
    """Agent attention: softmax attention to n agents and from them, linear in the tokens (Han et al. 2024).

    Agents are the means of the queries over the cells of a grid; the values also pass through a depthwise convolution.
    The weights that are returned are those of the two softmaxes, without the convolution.

    Args:
        dim: channels C.
        num_heads: heads.
        input_size: size of the map the bias tables are built for; its number of axes is that of the maps: one for
            sequences, two for images, three for volumes.
        agents: their number n, a square number for images and a cubic one for volumes, or the grid they form; None for
            49, or 64 in volumes.
        agent_grid: grid of the agents where it is to differ from the one the tables are built for.
        prefix: tokens in front of the map's, such as a class token: the module then takes sequences (B, prefix + H W,
            C), and works out the height and width of other sizes from the proportions of ``input_size``. Agents and
            convolution are of the map alone.
        sr_ratio: side of the cells that keys and values are reduced by, with a strided convolution and a LayerNorm.
        scale_power: power of the head's width that scales the scores.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        attn_drop: dropout on both softmaxes while training.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: agents that form no such grid, or forms that do not go together.
    """

    about = About("Han et al., ECCV 2024, 2312.08874", "O(N n)", "sdpa")
    grids: tuple[int, ...] = (1, 2, 3)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        input_size: Sequence[int] = (14, 14),
        agents: int | Sequence[int] | None = None,
        agent_grid: Sequence[int] | None = None,
        prefix: int = 0,
        sr_ratio: int = 1,
        scale_power: float = -0.5,
        qkv_bias: bool = True,
        attn_drop: Probability = 0.0,
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        size = tuple(input_size)
        axes = len(size)
        if axes not in (1, 2, 3) or min(size) < 1:
            raise InputError(f"attention 'agent': input_size={size} must be one to three sizes, each at least 1.")
        if prefix < 0 or sr_ratio < 1 or (prefix and (axes != 2 or sr_ratio > 1)) or (axes == 1 and sr_ratio > 1):
            raise InputError(
                f"attention 'agent': prefix={prefix} with sr_ratio={sr_ratio} on {axes} axes is not possible; a prefix "
                "goes before images alone, without reduction, and sequences take neither."
            )
        trained = _agent_grid(agents, axes)
        used = trained if agent_grid is None else tuple(agent_grid)
        if len(used) != axes or min(used) < 1 or (axes == 1 and used != trained):
            raise InputError(
                f"attention 'agent': agent_grid={used} must have {axes} sides, each at least 1, and is not for "
                "sequences, whose agents are learned."
            )
        self.grids = (1,) if prefix else (axes,)
        self.has_weights = sr_ratio == 1
        self.input_size = size
        self.agent_grid = used
        self.prefix = prefix
        self.sr_ratio = sr_ratio
        self.scale = self.head_dim**scale_power
        self.attn_drop = attn_drop
        if sr_ratio == 1:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        else:
            self.q = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
            self.sr = _CONVOLUTIONS[axes](dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if axes == 1:
            self.agent_tokens = nn.Parameter(torch.empty(num_heads, used[0], self.head_dim))
            nn.init.trunc_normal_(self.agent_tokens, std=0.02)
        else:
            self.dwc = _CONVOLUTIONS[axes](dim, dim, 3, padding=1, groups=dim)
            keys = [-(-side // sr_ratio) for side in size]
            self.bias = AgentBias(num_heads, trained, size, keys, prefix)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        grid = self._grid(x)
        q, k, v, seen = self._qkv(x, mask)
        out = heads_last(self._core(q, k, v, grid, mask, seen), x.shape[1:-1])
        if len(self.input_size) > 1:
            local = self._local(v[:, self.prefix :].flatten(-2), grid, mask)
            out = out + F.pad(local.flatten(1, -2), (0, 0, self.prefix, 0)).reshape(out.shape)
        return self.proj_drop(self.proj(out))

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        grid = self._grid(x)
        q, k, v, seen = self._qkv(x, mask)

        def core(values: Tensor) -> Tensor:
            return self._core(q, k, values, grid, mask, seen).transpose(1, 2).unflatten(1, x.shape[1:-1])

        return weights_of(core, v)

    def _qkv(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q (B, *grid, heads, D), k and v of the grid of keys, and which keys exist."""
        if self.sr_ratio == 1:
            q, k, v = (split_heads(part, self.num_heads) for part in blank(self.qkv(x), mask).chunk(3, -1))
            return q, k, v, mask
        extend = [n for side in reversed(x.shape[1:-1]) for n in (0, -side % self.sr_ratio)]
        reduced = to_channels_last(self.sr(to_channels_first(F.pad(x, (0, 0, *extend)))))
        seen = None  # no cell lies beyond the map altogether: without a mask all of them are real
        if mask is not None:
            seen = F.pad(mask, extend)
            for axis in range(1, mask.dim()):
                seen = seen.unflatten(axis, (-1, self.sr_ratio)).any(axis + 1)
        q = split_heads(blank(self.q(x), mask), self.num_heads)
        k, v = split_heads(blank(self.kv(self.norm(reduced)), seen), 2 * self.num_heads).chunk(2, -2)
        return q, k, v, seen

    def _core(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], mask: Tensor | None, seen: Tensor | None
    ) -> Tensor:
        """(B, heads, N, E)."""
        to_agents = from_agents = None
        if len(self.input_size) > 1:
            agents, there = self._pool(q, grid, mask)
            keys = grid if self.prefix else tuple(k.shape[1:-2])
            to_agents = self.bias.to_agents(keys, self.agent_grid)
            from_agents = self.bias.from_agents(grid, self.agent_grid)
        else:
            agents, there = self.agent_tokens.to(q.dtype).expand(len(q), -1, -1, -1), None
        return attend_agents(
            heads_first(q),
            heads_first(k),
            heads_first(v),
            agents,
            to_agents=to_agents,
            from_agents=from_agents,
            key_seen=None if seen is None else seen.flatten(1),
            agent_seen=there,
            scale=self.scale,
            dropout=self.attn_drop if self.training else 0.0,
        )

    def _pool(self, q: Tensor, grid: tuple[int, ...], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mean query of the real tokens of each agent's cell (B, heads, n, D), and which cells have any."""
        queries = to_channels_first(q.flatten(1, -3)[:, self.prefix :].flatten(-2).unflatten(1, grid))
        real = None if mask is None else mask.flatten(1)[:, self.prefix :].unflatten(1, grid)
        means, there = adaptive_mean(queries, real, self.agent_grid)
        agents = means.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
        return agents, None if there is None else there.flatten(1)

    def _local(self, v: Tensor, grid: tuple[int, ...], mask: Tensor | None) -> Tensor:
        """The depthwise convolution of the values (B, *grid of keys, C), on the map itself."""
        values = to_channels_first(v.unflatten(1, grid) if self.prefix else v)
        if self.sr_ratio > 1:
            values = resize(values, [side * self.sr_ratio for side in values.shape[2:]])
            for axis, side in enumerate(grid, 2):
                values = values.narrow(axis, 0, side)
            if mask is not None:
                values = values.masked_fill(~mask[:, None], 0)
        return to_channels_last(self.dwc(values))

    def _grid(self, x: Tensor) -> tuple[int, ...]:
        """Size of the map in ``x``, without the tokens in front of it."""
        if self.prefix:
            return grid_behind("agent", x.shape[1], self.prefix, self.input_size)
        return tuple(x.shape[1:-1])

    def packed(self, x: Tensor, cu_seqlens: Tensor, shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        if len(self.input_size) > 1 or (self.training and self.attn_drop):
            return super().packed(x, cu_seqlens, shapes)
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        segments = len(cu_seqlens) - 1
        agents = self.agent_tokens.to(q.dtype).transpose(0, 1).repeat(segments, 1, 1)
        cuts = torch.arange(segments + 1, device=x.device, dtype=cu_seqlens.dtype) * self.agent_grid[0]
        gathered, _ = varlen_attention(agents, k, v, cuts, cu_seqlens, scale=self.scale)
        out, _ = varlen_attention(q, agents, gathered, cu_seqlens, cuts, scale=self.scale)
        return self.proj_drop(self.proj(out.flatten(1)))

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, *grid = shape
        tokens, n = math.prod(grid), math.prod(self.agent_grid)
        keys = math.prod(-(-side // self.sr_ratio) for side in grid)
        axes = len(self.input_size)
        total = batch * tokens
        biases = [0, 0] if axes == 1 else [self.num_heads * n * keys, self.num_heads * n * tokens]
        parts = [
            projection("queries", total, self.dim, self.dim),
            projection("keys and values", batch * keys, self.dim, 2 * self.dim),
            attend("agents gather", batch * n, keys, self.dim, batch * keys, biases[0]),
            attend("tokens read agents", total, n, self.dim, batch * n, biases[1]),
            projection("output", total, self.dim, self.dim),
        ]
        if axes > 1:
            parts.append(depthwise("local", total, self.dim, 3**axes))
        if self.sr_ratio > 1:
            parts.insert(1, projection("reduction", batch * keys, self.dim * self.sr_ratio**axes, self.dim))
        return parts

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state with its tables under ``bias``, and with one projection where keys are not reduced."""
        state = {f"bias.{key}" if key.endswith("_bias") and "." not in key else key: t for key, t in state.items()}
        if "sr.weight" not in state:
            for kind in ("weight", "bias"):
                if f"q.{kind}" in state and f"kv.{kind}" in state:
                    state[f"qkv.{kind}"] = torch.cat([state.pop(f"q.{kind}"), state.pop(f"kv.{kind}")])
        return state


def _agent_grid(agents: int | Sequence[int] | None, axes: int) -> tuple[int, ...]:
    """The grid that ``agents`` stands for.

    Raises:
        InputError: no grid of that many axes has equal sides and so many places.
    """
    if agents is None:
        agents = 64 if axes == 3 else 49
    if not isinstance(agents, int):
        grid = tuple(agents)
        if len(grid) != axes or min(grid) < 1:
            raise InputError(f"attention 'agent': agents={grid} must have {axes} sides, each at least 1.")
        return grid
    side = round(max(agents, 0) ** (1 / axes))
    if agents < 1 or side**axes != agents:
        raise InputError(
            f"attention 'agent': agents={agents} do not form a grid of {axes} equal sides; take "
            f"{max(side, 1) ** axes} or {(side + 1) ** axes}, or give the grid."
        )
    return (side,) * axes
