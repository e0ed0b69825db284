"""Queries that read a map: the layer of mask decoders in which tokens look at image features.

Sources: the token-to-image attention of Kirillov et al., Segment Anything, ICCV 2023, arXiv 2304.02643 (its two-way
transformer: inner width halved, positions added to queries and keys, normalisation after the residual), which Tran et
al., QTSeg, arXiv 2412.17241, take over. With learned queries and normalisation in front it is the readout of
Perceiver-like models (Jaegle et al., ICML 2021, arXiv 2103.03206).

With few queries the tokens are not projected; where many queries read few tokens, the queries are not (see
:mod:`attention.folding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, attend, elementwise, projection
from attention.cross import Cross
from attention.folding import Folded, ask_folded, asking_cost, folded_cost, folds, read_folded
from attention.layout import heads_first, split_heads, weights_of
from attention.masking import blank, key_mask
from attention.parameters import NotNegative, Probability
from attention.registry import register
from kernels.errors import InputError, unknown_name

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


@register("query_readout", kind="cross")
class QueryReadout(Cross):
    """Query readout: given or learned queries read a map, as in the decoder of SAM (Kirillov et al. 2023).

    Args:
        dim: channels C.
        num_heads: heads.
        downsample_rate: how many times narrower than the channels queries, keys and values are.
        norm: ``"post"`` normalises the sum of queries and what they read, as in SAM; ``"pre"`` normalises queries and
            tokens, each by a norm of its own, before they meet; None leaves both as they are.
        residual: whether the queries are added to what they read, and to the output of the MLP.
        mlp_dim: inner width of an MLP after the attention; None for no MLP. SAM has 2048.
        act: ``"relu"`` or ``"gelu"`` in the MLP.
        num_queries: learned queries, read with where none are given (``q=None``); None for none.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        proj_drop: dropout on the outputs of attention and MLP while training.
        eps: of the layer normalisations.

    Raises:
        InputError: widths do not divide, or an option is not known.
    """

    about = About("Kirillov et al., ICCV 2023, 2304.02643", "O(M N)", "sdpa", "Apache-2.0")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        downsample_rate: int = 2,
        norm: Literal["post", "pre"] | None = "post",
        residual: bool = True,
        mlp_dim: int | None = None,
        act: Literal["relu", "gelu"] = "relu",
        num_queries: int | None = None,
        qkv_bias: bool = True,
        proj_drop: Probability = 0.0,
        eps: NotNegative = 1e-5,
    ) -> None:
        super().__init__(dim, num_heads)
        if downsample_rate < 1 or self.head_dim % downsample_rate:
            fitting = [rate for rate in range(1, self.head_dim + 1) if self.head_dim % rate == 0]
            raise InputError(
                f"attention 'query_readout': downsample_rate={downsample_rate} does not divide the {self.head_dim} "
                f"channels of a head; take one of {', '.join(map(str, fitting))}."
            )
        if norm not in ("post", "pre", None):
            raise unknown_name("attention.norm", norm, ("post", "pre", "null"))
        if act not in _ACTIVATIONS:
            raise unknown_name("attention.act", act, _ACTIVATIONS)
        for name, value in (("mlp_dim", mlp_dim), ("num_queries", num_queries)):
            if value is not None and value < 1:
                raise InputError(f"attention 'query_readout': {name}={value} must be at least 1, or null for none.")
        self.inner = dim // downsample_rate
        self.residual = residual
        self.q_proj = nn.Linear(dim, self.inner, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, self.inner, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, self.inner, bias=qkv_bias)
        self.out_proj = nn.Linear(self.inner, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.norm_q = nn.LayerNorm(dim, eps=eps) if norm == "pre" else nn.Identity()
        self.norm_kv = nn.LayerNorm(dim, eps=eps) if norm == "pre" else nn.Identity()
        self.norm = nn.LayerNorm(dim, eps=eps) if norm == "post" else nn.Identity()
        self.mlp: nn.Sequential | None = None
        if mlp_dim is not None:
            self.mlp = nn.Sequential()
            self.mlp.add_module("norm", nn.LayerNorm(dim, eps=eps) if norm == "pre" else nn.Identity())
            self.mlp.add_module("lin1", nn.Linear(dim, mlp_dim))
            self.mlp.add_module("act", _ACTIVATIONS[act]())
            self.mlp.add_module("lin2", nn.Linear(mlp_dim, dim))
            self.mlp.add_module("drop", nn.Dropout(proj_drop))
        has_post = norm == "post" and mlp_dim is not None
        self.norm_mlp = nn.LayerNorm(dim, eps=eps) if has_post else nn.Identity()
        self.queries: nn.Parameter | None = None
        if num_queries is not None:
            self.queries = nn.Parameter(torch.randn(num_queries, dim) * 0.02)

    def forward(
        self,
        q: Tensor | None,
        kv: Tensor,
        mask: Tensor | None = None,
        *,
        return_attention: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As :meth:`attention.cross.Cross.forward`; without ``q`` the learned queries read.

        The options ``q_pos`` (B or 1, M, C) and ``kv_pos`` (B or 1, N, C) are positional encodings: they are added to
        queries and keys, not to values nor to the residual.
        """
        if q is None:
            if self.queries is None:
                raise InputError(
                    "attention 'query_readout' was given no queries and has none of its own; set num_queries."
                )
            q = self.queries.expand(len(kv), -1, -1)
        return super().forward(q, kv, mask, return_attention=return_attention, **options)

    def read(
        self,
        q: Tensor,
        kv: Tensor,
        mask: Tensor | None,
        want_weights: bool,
        q_pos: Tensor | None = None,
        kv_pos: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        values = self.norm_kv(kv)  # of finite tokens, masked ones too
        keys = values if kv_pos is None else blank(values + kv_pos, mask)
        asking = self.norm_q(q)
        asking = asking if q_pos is None else asking + q_pos
        weights: Tensor | None
        if folds(q.shape[1], self.num_heads, self.dim, self.inner):
            layers = Folded(self.k_proj, self.v_proj, self.num_heads)
            found, seen = read_folded(self.q_proj(asking), keys, values, layers, mask)
            out, weights = self.out_proj(found), seen.to(q.dtype) if want_weights else None
        elif folds(kv.shape[1], self.num_heads, self.dim, self.inner):
            few = self.k_proj(keys), self.v_proj(values)
            out, seen = ask_folded(asking, *few, self.q_proj, self.out_proj, self.num_heads, mask)
            weights = seen.to(q.dtype) if want_weights else None
        else:
            found, weights = self._read_projected(self.q_proj(asking), keys, values, mask, want_weights)
            out = self.out_proj(found)
        out = self.proj_drop(out)
        out = self.norm(q + out if self.residual else out)
        if self.mlp is not None:
            out = self.norm_mlp(out + self.mlp(out) if self.residual else self.mlp(out))
        return out, weights

    def _read_projected(
        self, wanted: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        queries = heads_first(split_heads(wanted, self.num_heads))
        k = heads_first(split_heads(self.k_proj(keys), self.num_heads))
        v = split_heads(self.v_proj(values), self.num_heads)

        def core(read: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(queries, k, heads_first(read), attn_mask=key_mask(mask))
            return out.transpose(1, 2)

        return core(v).flatten(2), weights_of(core, v) if want_weights else None

    def cost(self, shape: Sequence[int]) -> list[Part]:
        batch, queries, tokens = shape
        asked = batch * queries
        parts = []
        if isinstance(self.norm_kv, nn.LayerNorm):
            parts.append(elementwise("normalisation of tokens", batch * tokens * self.dim, flops=8))
        if folds(queries, self.num_heads, self.dim, self.inner):
            parts.append(projection("queries", asked, self.dim, self.inner))
            parts += folded_cost(batch, queries, tokens, self.num_heads, self.dim, self.inner)
            parts.append(projection("output", asked, self.inner, self.dim))
        elif folds(tokens, self.num_heads, self.dim, self.inner):
            parts.append(projection("keys and values", batch * tokens, self.dim, 2 * self.inner))
            parts += asking_cost(batch, queries, tokens, self.num_heads, self.dim, self.inner)
        else:
            parts += [
                projection("queries", asked, self.dim, self.inner),
                projection("keys and values", batch * tokens, self.dim, 2 * self.inner),
                attend("attention", asked, tokens, self.inner, batch * tokens),
                projection("output", asked, self.inner, self.dim),
            ]
        if self.mlp is not None:
            inner = self.mlp.get_submodule("lin1").out_features
            assert isinstance(inner, int)
            parts += [projection("MLP, in", asked, self.dim, inner), projection("MLP, out", asked, inner, self.dim)]
        return parts

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of SAM's two-way transformer and of QTSeg's decoder, of one layer cut out of them, to ours."""
        renamed = {}
        for key, value in state.items():
            for official, ours in _OFFICIAL.items():
                if key.startswith(official):
                    key = ours + key.removeprefix(official)
                    break
            renamed[key] = value
        return renamed


_OFFICIAL = {
    "cross_attn_token_to_image.": "",
    "final_attn_token_to_image.": "",
    "norm_final_attn.": "norm.",
    "norm2.": "norm.",
    "norm3.": "norm_mlp.",
}
