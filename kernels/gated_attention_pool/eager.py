"""Attention pooling on any device: products over all rows in pieces that stay in cache, cut at bags only where they
must be.

Scores of all bags come from one product over the packed rows. The backward pass goes over the rows once: it takes or
recomputes the gates of a piece and adds what the weighted sum sends back while the piece is still in cache. Half
precision is converted piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.dense import BACKWARD_ROWS, FORWARD_ROWS, project, weight_gradient
from kernels.gated_attention_pool.gate import activate, gradient, product
from kernels.gated_attention_pool.reference import MASKED
from kernels.segment import choose_form, cut_at_bags, segment_ids, segment_max, segment_sum

# Rows of a piece on other devices, which have no cache to stay in but launch every operation anew.
_DEVICE_ROWS = 1 << 16
# Elements of the queries gathered for a piece where bags are too short to be cut.
_GATHERED = 1 << 22


def forward(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    score: Tensor,
    score_bias: Tensor,
    cu_seqlens: Tensor,
    values: Tensor | None,
    drop_mask: Tensor | None,
    keep_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pooled values (B, K, E), log-sum-exp (B, K), scores (N, K), stats (2, B, K), gates (N or 0, gate units)."""
    values = x if values is None else values
    precise = torch.promote_types(x.dtype, torch.float32)
    gates = x.new_empty(len(x) if keep_gates else 0, len(gate), dtype=precise)
    raw = scores(x, gate, gate_bias, score, score_bias, gates if keep_gates else None)
    masked = raw if drop_mask is None else raw.masked_fill(drop_mask, MASKED)
    bags = _Bags(cu_seqlens, len(x), len(score) * values.shape[1])
    highest = segment_max(masked, cu_seqlens)
    exponentials = torch.exp_(masked - bags.rows_of(highest))
    total = segment_sum(exponentials, cu_seqlens)
    pooled = bags.weighted_sum(exponentials, values).div_(total.where(total != 0, 1)[:, :, None])
    lse = (highest + total.log()).where(total != 0, -torch.inf)
    return pooled.to(values.dtype), lse, raw, torch.stack([highest, total]), gates


def scores(
    x: Tensor, gate: Tensor, gate_bias: Tensor, score: Tensor, score_bias: Tensor, gates: Tensor | None = None
) -> Tensor:
    """The scores (N, K), float32 at least; the activations go into ``gates``."""
    precise = torch.promote_types(x.dtype, torch.float32)
    gate, gate_bias, score, score_bias = (t.to(precise) for t in (gate, gate_bias, score, score_bias))
    width = score.shape[1]
    out = x.new_empty(len(x), len(score), dtype=precise)
    for start in range(0, len(x), _rows(x, FORWARD_ROWS)):
        rows = slice(start, start + _rows(x, FORWARD_ROWS))
        piece = activate(project(_dense(x[rows], precise), gate, gate_bias), width)
        torch.addmm(score_bias, product(piece, width), score.t(), out=out[rows])
        if gates is not None:
            gates[rows] = piece
    return out


def backward(
    d_pooled: Tensor | None,
    d_lse: Tensor | None,
    d_scores: Tensor | None,
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    score: Tensor,
    score_bias: Tensor,
    cu_seqlens: Tensor,
    values: Tensor | None,
    drop_mask: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    stats: Tensor,
    for_x: bool,
    for_values: bool,
    gates: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gate, gate_bias, score, score_bias and values; None those of x and values that nobody wants."""
    precise = scores.dtype
    weights = [t.to(precise) for t in (gate, gate_bias, score, score_bias)]
    gate_, gate_bias_, score_, _ = weights
    d_gate, d_gate_bias, d_score, d_score_bias = (torch.zeros_like(t) for t in weights)
    width = score.shape[1]
    gate_t = gate_.t().contiguous()
    for_values = for_values and values is not None
    d_x = x.new_empty(x.shape) if for_x else None
    d_values = x.new_empty(values.shape) if for_values and values is not None else None
    # The mean of what arrives, which a softmax takes off, follows from the outputs; the gradient of the log-sum-exp
    # enters with it.
    highest, total = stats
    mean = torch.zeros_like(highest)
    if d_pooled is not None:
        d_pooled = d_pooled.to(precise)
        mean = (d_pooled * pooled).sum(-1)
    if d_lse is not None:
        mean = mean - d_lse
    bags = _Bags(cu_seqlens, len(x), score.shape[0] * pooled.shape[2])
    for piece in bags.pieces(_rows(x, BACKWARD_ROWS)):
        rows = piece.rows
        features = _dense(x[rows], precise)
        masked = scores[rows] if drop_mask is None else scores[rows].masked_fill(drop_mask[rows], MASKED)
        attention = torch.exp_(masked - piece.rows_of(highest)).div_(piece.rows_of(total))
        pooled_features = features if values is None else values[rows].to(precise)
        if d_pooled is None:
            arriving = torch.zeros_like(attention)
        else:
            arriving = piece.dot(pooled_features, d_pooled)
        d_piece = arriving.sub_(piece.rows_of(mean)).mul_(attention)
        if drop_mask is not None:
            d_piece.masked_fill_(drop_mask[rows], 0)
        if d_scores is not None:
            d_piece += d_scores[rows]
        active = activate(project(features, gate_, gate_bias_), width) if gates is None else gates[rows]
        d_score.addmm_(d_piece.t(), product(active, width))
        d_score_bias += d_piece.sum(0)
        d_gates = gradient(d_piece @ score_, active, width)
        d_gate += weight_gradient(d_gates, features)
        d_gate_bias += d_gates.sum(0)
        if d_x is not None:
            d_features = project(d_gates, gate_t)
            if d_pooled is not None and values is None:
                piece.add_spread(d_features, attention, d_pooled)
            d_x[rows] = d_features
        if d_values is not None:
            spread = torch.zeros_like(pooled_features)
            if d_pooled is not None:
                piece.add_spread(spread, attention, d_pooled)
            d_values[rows] = spread
    d_weights = (d_gate, d_gate_bias, d_score, d_score_bias)
    originals = (gate, gate_bias, score, score_bias)
    return d_x, *(d.to(t.dtype) for d, t in zip(d_weights, originals, strict=True)), d_values


def _rows(x: Tensor, on_cpu: int) -> int:
    return on_cpu if x.device.type == "cpu" else _DEVICE_ROWS


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()


class _Bags:
    """Where the bags of a packed batch begin, for the products that differ from bag to bag.

    Long bags are cut out of the rows and multiplied one by one; short ones gather their bag's operand for every row.
    """

    def __init__(self, cu_seqlens: Tensor, total: int, width: int) -> None:
        """``width`` is the number of elements of one bag's operand, K * E."""
        self.cu_seqlens = cu_seqlens
        self.total = total
        self.cut = choose_form("auto", cu_seqlens, total) == "per_bag"
        self.one = cu_seqlens.numel() == 2
        self.ids = None if self.one else segment_ids(cu_seqlens, total)
        self.gathered_rows = max(_GATHERED // max(width, 1), 1)

    def rows_of(self, per_bag: Tensor, rows: slice = slice(None)) -> Tensor:
        """``per_bag (B, K)`` for each of ``rows``, broadcastable to (n, K)."""
        return per_bag if self.ids is None else per_bag[self.ids[rows]]

    def pieces(self, rows: int) -> Iterator[_Piece]:
        """All rows in pieces of about ``rows``."""
        if self.cut:
            for piece, parts in cut_at_bags(self.cu_seqlens, self.total, rows):
                yield _Piece(self, piece, parts)
        else:
            step = min(rows, self.gathered_rows)
            for start in range(0, self.total, step):
                yield _Piece(self, slice(start, min(start + step, self.total)), None)

    def weighted_sum(self, weights: Tensor, values: Tensor) -> Tensor:
        """Sum over each bag of ``weights (N, K)`` times ``values (N, E)``, (B, K, E), in the dtype of the weights."""
        bags, branches = self.cu_seqlens.numel() - 1, weights.shape[1]
        out = weights.new_zeros(bags, branches, values.shape[1])
        for piece in self.pieces(_rows(values, BACKWARD_ROWS)):
            piece.add_weighted_sum(out, weights[piece.rows], values[piece.rows].to(weights.dtype))
        return out


class _Piece:
    """Some neighbouring rows; ``parts`` are their bags and where in the piece these lie, None if they are not cut."""

    def __init__(self, bags: _Bags, rows: slice, parts: list[tuple[int, slice]] | None) -> None:
        self.bags = bags
        self.rows = rows
        self.parts = parts
        self._gathered: Tensor | None = None

    def rows_of(self, per_bag: Tensor) -> Tensor:
        """``per_bag (B, K)`` for each row, broadcastable to (n, K)."""
        return self.bags.rows_of(per_bag, self.rows)

    def add_weighted_sum(self, out: Tensor, weights: Tensor, values: Tensor) -> None:
        """Add to each bag of ``out (B, K, E)`` its rows of ``values (n, E)`` times ``weights (n, K)``."""
        if self.parts is not None:
            for bag, part in self.parts:
                out[bag].addmm_(weights[part].t(), values[part])
        else:
            assert self.bags.ids is not None
            out.index_add_(0, self.bags.ids[self.rows], weights[:, :, None] * values[:, None])

    def dot(self, values: Tensor, queries: Tensor) -> Tensor:
        """Inner products (n, K) of each row of ``values (n, E)`` with its bag's rows of ``queries (B, K, E)``."""
        out = values.new_empty(len(values), queries.shape[1])
        if self.parts is not None:
            for bag, part in self.parts:
                torch.mm(values[part], queries[bag].t(), out=out[part])
            return out
        return torch.bmm(self._own(queries), values[:, :, None])[:, :, 0]

    def add_spread(self, out: Tensor, weights: Tensor, queries: Tensor) -> None:
        """Add to each row of ``out (n, E)`` its ``weights (n, K)`` times its bag's rows of ``queries (B, K, E)``."""
        if self.parts is not None:
            for bag, part in self.parts:
                out[part].addmm_(weights[part], queries[bag])
        else:
            out += torch.bmm(weights[:, None], self._own(queries))[:, 0]

    def _own(self, queries: Tensor) -> Tensor:
        """Each row's own queries (n, K, E); a piece is asked about one tensor of queries only."""
        if self._gathered is None:
            assert self.bags.ids is not None
            self._gathered = queries[self.bags.ids[self.rows]]
        return self._gathered
