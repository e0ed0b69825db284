"""Flow attention: linear attention in which keys compete and queries are allocated, as flows through a network.

Source: Wu et al., Flowformer: Linearizing Transformers with Conservation Flows, ICML 2022, arXiv 2202.06258, without
the causal form. The released code has no mask, and its authors advise to set masked values to 0, which leaves masked
keys in the flows; here they are in no sum and no count. The factor L / S of the allocation, which the released code has
for queries and keys that differ in number, is that of real tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, elementwise, linear_attention, projection
from attention.cross import Cross
from attention.layout import split_heads, split_qkv, weights_of
from attention.masking import blank
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from kernels.errors import InputError, unknown_name
from kernels.linear_attention import flow_attention, linear_attention_2pass
from kernels.operators import precisely

FORMS = {"paper": 0.0, "vision": 1e-6}
"""What each form adds to every flow after its products, in which 1e-6 is added to both factors."""
_EPS = 1e-6


@register("flow", kind="mixer")
class FlowAttention(Mixer):
    """Flow attention among the tokens of a map: linear, by competition of keys and allocation (Wu et al. 2022).

    See :func:`kernels.linear_attention.flow_attention` for the formula.

    Args:
        dim: channels C.
        num_heads: heads.
        form: ``"paper"``, or ``"vision"`` with the further 1e-6 of the authors' vision backbone.
        inner_dim: channels of queries, keys and values in all; those of the input by default.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        proj_drop: dropout on the output while training; the authors' vision backbone has none.

    Raises:
        InputError: an unknown form, or an inner width that the heads do not divide.
    """

    about = About("Wu et al. (Flowformer), ICML 2022, 2202.06258", "O(N)", "linear_attention_2pass", "MIT")
    grids = (1, 2, 3)
    rows_sum_to_one = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        form: str = "paper",
        inner_dim: int | None = None,
        qkv_bias: bool = True,
        proj_drop: Probability = 0.05,
    ) -> None:
        super().__init__(dim, num_heads)
        self.inner_dim, self.eps_after = _checked(dim, num_heads, inner_dim, form)
        self.head_dim = self.inner_dim // num_heads
        self.qkv = nn.Linear(dim, 3 * self.inner_dim, bias=qkv_bias)
        self.proj = nn.Linear(self.inner_dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x.flatten(1, -2)), self.num_heads)
        out = self._core(q, k, v, mask)
        return self.proj_drop(self.proj(out.flatten(2))).unflatten(1, x.shape[1:-1])

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x.flatten(1, -2)), self.num_heads)
        return weights_of(lambda values: self._core(q, k, values, mask), v)

    def _core(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return flow_attention(q, k, v, eps_after=self.eps_after)
        real = mask.flatten(1)
        return masked_flow(q, k, v, real, real, self.eps_after)

    def packed(self, x: Tensor, cu_seqlens: Tensor, shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        out = flow_attention(q, k, v, cu_seqlens=cu_seqlens, eps_after=self.eps_after)
        return self.proj_drop(self.proj(out.flatten(1)))

    def cost(self, shape: Sequence[int]) -> list[Part]:
        tokens = math.prod(shape)
        return [
            projection("q, k, v", tokens, self.dim, 3 * self.inner_dim),
            # Two sums over all tokens come before what they are used for: queries and keys are read again.
            elementwise("flows", 2 * tokens * self.inner_dim, 2, 10),
            linear_attention("attention", tokens, self.inner_dim, self.head_dim),
            projection("output", tokens, self.inner_dim, self.dim),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state; outside the vision backbone the projection is in three parts."""
        names = {"qkv": [f"{name}_projection" for name in ("query", "key", "value")], "proj": ["out_projection"]}
        return _joined(state, names)


@register("flow", kind="cross")
class FlowCross(Cross):
    """Flow attention of queries to other tokens: linear, by competition and allocation (Wu et al. 2022).

    Args:
        dim: channels C.
        num_heads: heads.
        form: ``"paper"``, or ``"vision"`` with a further 1e-6 on each flow.
        inner_dim: channels of queries, keys and values in all; those of the input by default.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: an unknown form, or an inner width that the heads do not divide.
    """

    about = About("Wu et al. (Flowformer), ICML 2022, 2202.06258", "O(M + N)", "linear_attention_2pass", "MIT")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        form: str = "paper",
        inner_dim: int | None = None,
        qkv_bias: bool = True,
        proj_drop: Probability = 0.05,
    ) -> None:
        super().__init__(dim, num_heads)
        self.inner_dim, self.eps_after = _checked(dim, num_heads, inner_dim, form)
        self.head_dim = self.inner_dim // num_heads
        self.q = nn.Linear(dim, self.inner_dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * self.inner_dim, bias=qkv_bias)
        self.proj = nn.Linear(self.inner_dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def read(
        self, q: Tensor, kv: Tensor, mask: Tensor | None, want_weights: bool, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`attention.cross.Cross`.

        Args:
            options: ``values``, (B, N, C): tokens to make values of, in the place of those that keys are made of.
        """
        queries = split_heads(self.q(q), self.num_heads)
        values = options.get("values")
        if values is None:
            k, v = (split_heads(t, self.num_heads) for t in self.kv(kv).chunk(2, -1))
        elif values.shape != kv.shape:
            raise InputError(
                f"attention 'flow': values {tuple(values.shape)} must have the shape of the tokens they belong to, "
                f"{tuple(kv.shape)}."
            )
        else:
            biases = (None, None) if self.kv.bias is None else self.kv.bias.chunk(2)
            k, v = (
                split_heads(F.linear(tokens, weight, bias), self.num_heads)
                for tokens, weight, bias in zip((kv, blank(values, mask)), self.kv.weight.chunk(2), biases, strict=True)
            )

        def core(given: Tensor) -> Tensor:
            if mask is None:
                return flow_attention(queries, k, given, eps_after=self.eps_after)
            return masked_flow(queries, k, given, None, mask, self.eps_after)

        out = self.proj_drop(self.proj(core(v).flatten(2)))
        return out, weights_of(core, v) if want_weights else None

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, queries, tokens = shape
        inner = self.inner_dim
        return [
            projection("queries", batch * queries, self.dim, inner),
            projection("keys and values", batch * tokens, self.dim, 2 * inner),
            elementwise("flows", batch * (queries + tokens) * inner, 2, 10),
            Part(
                "attention",
                2 * batch * (queries + tokens) * inner * self.head_dim,
                2 * batch * (queries + tokens) * inner,
            ),
            projection("output", batch * queries, inner, self.dim),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state, whose keys and values have a projection each."""
        names = {"q": ["query_projection"], "kv": ["key_projection", "value_projection"], "proj": ["out_projection"]}
        return _joined(state, names)


def masked_flow(
    q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None, key_mask: Tensor, eps_after: float = 0.0
) -> Tensor:
    """:func:`kernels.linear_attention.flow_attention` of the real tokens alone.

    Args:
        q: (B, N, heads, D).
        k, v: (B, M, heads, D) and (B, M, heads, E).
        query_mask: (B, N), true for real tokens; None if all are.
        key_mask: (B, M).

    Returns:
        (B, N, heads, E), 0 for masked queries and where there is no key.
    """
    precise = torch.promote_types(q.dtype, torch.float32)
    f, g = q.to(precise).sigmoid(), k.to(precise).sigmoid()
    g = g.masked_fill(~key_mask[..., None, None], 0)
    keys = key_mask.sum(1)[:, None, None].to(precise)
    if query_mask is None:
        queries = torch.full_like(keys, q.shape[1])
    else:
        f = f.masked_fill(~query_mask[..., None, None], 0)
        queries = query_mask.sum(1)[:, None, None].to(precise)

    def flow(rows: Tensor, sums: Tensor) -> Tensor:
        """(B, tokens, heads) from (B, tokens, heads, D) and (B, heads, D)."""
        return torch.einsum("bnhd,bhd->bnh", rows + _EPS, sums + _EPS) + eps_after

    def total(rows: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("bnhd,bnh->bhd", rows, weights)

    with precisely(q):
        of_query = flow(f, g.sum(1)).reciprocal()
        of_key = flow(g, f.sum(1)).reciprocal()
        conserved_query = flow(f, total(g, of_key))
        conserved_key = flow(g, total(f, of_query)).clamp(-1, 1)
        allocation = (conserved_query * queries / keys.clamp_min(1)).sigmoid()
        # What is conserved is at most 1, so that this is out of reach.
        competition = conserved_key.masked_fill(~key_mask[..., None], -1e4).softmax(1) * keys
    out = linear_attention_2pass(
        f,
        g,
        v.to(precise).masked_fill(~key_mask[..., None, None], 0),
        normaliser="none",
        feature_map="identity",
        key_weight=competition,
        query_weight=allocation * of_query,
    )
    return out.to(q.dtype)


def _checked(dim: int, num_heads: int, inner_dim: int | None, form: str) -> tuple[int, float]:
    """Inner width and what is added after each flow."""
    if form not in FORMS:
        raise unknown_name("attention.form", form, FORMS)
    inner = dim if inner_dim is None else inner_dim
    if inner < 1 or inner % num_heads:
        raise InputError(
            f"attention 'flow': inner_dim={inner} is not divisible into num_heads={num_heads} heads; take a multiple "
            f"of {num_heads}."
        )
    return inner, FORMS[form]


def _joined(state: dict[str, Tensor], names: dict[str, list[str]]) -> dict[str, Tensor]:
    """``state`` with the layers of each list end to end under its name."""
    for ours, parts in names.items():
        for kind in ("weight", "bias"):
            if all(f"{part}.{kind}" in state for part in parts):
                state[f"{ours}.{kind}"] = torch.cat([state.pop(f"{part}.{kind}") for part in parts])
    return state
