"""Agent attention within stripes of a map, as the branches of a cross-shaped window transformer use it.

Source: Han et al., ECCV 2024, arXiv 2312.08874, in the CSWin transformer (Dong et al., CVPR 2022, arXiv 2107.00652).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from attention.agent_bias import AgentBias, attend_agents
from kernels.errors import InputError


class StripeAgentAttention(nn.Module):
    """Agent attention in stripes, of queries, keys and values that are projected outside.

    Each stripe has its own agents; the depthwise convolution of the values stops at its edges.

    Args:
        dim: channels C of this branch.
        num_heads: heads of this branch.
        stripe: height and width of a stripe, which must divide those of the map: its whole height and a few columns for
            CSWin's vertical stripes.
        agents: grid of the agents of a stripe.
        attn_drop: dropout on both softmaxes while training.

    Raises:
        InputError: heads or stripes do not divide what they must.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stripe: Sequence[int],
        agents: Sequence[int] = (3, 3),
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise InputError(f"agent attention in stripes: dim={dim} is not divisible into num_heads={num_heads}.")
        if len(stripe) != 2 or len(agents) != 2 or min(*stripe, *agents) < 1:
            raise InputError(
                f"agent attention in stripes: stripe={tuple(stripe)} and agents={tuple(agents)} must be two sizes "
                "each, all at least 1."
            )
        self.dim = dim
        self.num_heads = num_heads
        self.stripe = tuple(stripe)
        self.attn_drop = attn_drop
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.bias = AgentBias(num_heads, agents, stripe, stripe)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within stripes; all of (B, H, W, C).

        Raises:
            InputError: the stripes do not divide the map.
        """
        batch, height, width, _ = q.shape
        if height % self.stripe[0] or width % self.stripe[1]:
            raise InputError(
                f"agent attention in stripes: stripes of {self.stripe} do not divide a map of {(height, width)}; pad "
                "the map to a multiple."
            )
        q, k, v = (self._cut(x) for x in (q, k, v))
        agents = F.adaptive_avg_pool2d(q, (self.bias.agents[0], self.bias.agents[1]))
        out = attend_agents(
            *(self._heads(x) for x in (q, k, v, agents)),
            to_agents=self.bias.to_agents(self.stripe, self.bias.agents),
            from_agents=self.bias.from_agents(self.stripe, self.bias.agents),
            scale=(self.dim // self.num_heads) ** -0.5,
            dropout=self.attn_drop if self.training else 0.0,
        )
        out = out.transpose(2, 3).reshape(q.shape) + self.get_v(v)
        rows, columns = height // self.stripe[0], width // self.stripe[1]
        return out.unflatten(0, (batch, rows, columns)).permute(0, 1, 4, 2, 5, 3).reshape(batch, height, width, -1)

    def _cut(self, x: Tensor) -> Tensor:
        """(B, H, W, C) as (B * stripes, C, height, width)."""
        x = x.unflatten(2, (-1, self.stripe[1])).unflatten(1, (-1, self.stripe[0]))
        return x.permute(0, 1, 3, 5, 2, 4).flatten(0, 2)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, C, ...) as (B, heads, N, D)."""
        return x.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state with its tables under ``bias``."""
        return {f"bias.{key}" if key.endswith("_bias") else key: value for key, value in state.items()}
