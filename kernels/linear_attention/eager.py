"""Linear attention on any device: both passes piece by piece, each piece's features in scratch memory that is reused.

A piece is some whole sequences or part of a long one, small enough for the cache of a CPU. Its features and values are
written once, heads first and each with a column of ones, so that one batched matrix product gives all of a state and
another applies all of it; only a rotary embedding, which leaves the sums of features alone, needs them apart.
Everything is summed in float32 (float64 for float64), half-precision inputs are converted piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_attention.forms import (
    Form,
    has_constant,
    prepare,
    prepare_backward,
    row_slope,
    row_weights,
    weighs_rows,
)

# Elements of a piece's features: a few megabytes with the scratch tensors beside it. A GPU wants few large pieces.
_PIECE = {"cpu": 1 << 18}
_LARGEST_PIECE = 1 << 27


class Piece(NamedTuple):
    """Batch items and tokens of a dense or packed tensor, and the rows of the state they belong to."""

    items: slice
    tokens: slice
    states: slice


class Scratch:
    """Memory reused from piece to piece: fresh pages cost a CPU as much as the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._dtype = torch.promote_types(like.dtype, torch.float32)
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised contiguous tensor; the one taken before under this name is overwritten."""
        size = 1
        for length in shape:
            size *= length
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = self._like.new_empty(size, dtype=self._dtype)
        return flat[:size].view(shape)

    def with_one(self, name: str, x: Tensor, one: bool, spare: int = 0) -> tuple[Tensor, Tensor]:
        """Room for a piece (b, n, H, D) as (b, H, n, D + one + spare), ones in column D; also its first D columns."""
        batch, tokens, heads, width = x.shape
        rows = self.take(name, (batch, heads, tokens, width + one + (spare if one else 0)))
        if one:
            rows[..., width] = 1
        return rows, rows[..., :width]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    query_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cos: Tensor | None,
    key_sin: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor]:
    """Output (B, N, H, E) and state (S, H, D + 1, E + 1), both contiguous."""
    scratch = Scratch(q)
    kind = form.kind(cos is not None)
    key_angles, angles = _angles(key_cos, key_sin), _angles(cos, sin)
    one = kind != "linear"  # which needs no sums but the matrix: without ones its products are aligned
    precise = torch.promote_types(q.dtype, torch.float32)
    width, value_width = q.shape[3], v.shape[3]
    states = q.shape[0] if cu_q is None else cu_q.numel() - 1
    state = q.new_zeros(states, q.shape[2], width + 1, value_width + 1, dtype=precise)
    for piece in _pieces(k, v, cu_k):
        keys, features = _features(k[piece.items, piece.tokens], scratch, form, one)
        values = _values(v[piece.items, piece.tokens], scratch, one)
        weight = None if key_weight is None else _per_token(key_weight, piece)
        if weight is not None:
            keys[..., : width + one].mul_(weight)  # a rotation is linear: it may come after
        if not one:
            state[piece.states, :, -1, -1] += keys.shape[2] if weight is None else weight.sum((2, 3))
        total = features.sum(2) if key_angles is not None and weighs_rows(kind) else None
        _rotate(features, key_angles, piece)
        sums = _bmm(keys[..., : width + one].mT, values, scratch)
        if total is not None:
            sums[..., :-1, -1] = total
        _used(state[piece.states], one).add_(sums)
    prepared = prepare(state, form, kind)
    out = (q.new_empty if cu_q is None else q.new_zeros)(*q.shape[:3], value_width)
    for piece in _pieces(q, v, cu_q):
        here = prepared[piece.states]
        queries, features = _features(q[piece.items, piece.tokens], scratch, form, one)
        target = out[piece.items, piece.tokens].transpose(1, 2)
        if weighs_rows(kind):
            a, b, rows = _weighed_rows(features, here, angles, piece, form, kind, scratch)
            rows = rows if a is None else rows.mul_(a)
            rows = rows if b is None else rows.addcmul_(b, here[..., -1:, :-1])
        else:
            _rotate(features, angles, piece)
            rows = _bmm(queries[..., : width + one], _used(here, one)[..., :value_width], scratch)
        target.copy_(rows if query_weight is None else rows.mul_(_per_token(query_weight, piece)))
    return out, state


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    query_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cos: Tensor | None,
    key_sin: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    state: Tensor,
    form: Form,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, key_weight and query_weight."""
    scratch = Scratch(q)
    kind = form.kind(cos is not None)
    one = kind != "linear"
    d_q = (q.new_empty if cu_q is None else q.new_zeros)(q.shape)
    d_k, d_v = ((t.new_empty if cu_k is None else t.new_zeros)(t.shape) for t in (k, v))
    d_key_weight, d_query_weight = (None if w is None else w.new_zeros(w.shape) for w in (key_weight, query_weight))
    prepared = prepare(state, form, kind)
    d_prepared = torch.zeros_like(state)
    angles = _angles(cos, sin)
    for piece in _pieces(q, v, cu_q):
        grad = _values(grad_out[piece.items, piece.tokens], scratch, one)
        queries, features = _features(q[piece.items, piece.tokens], scratch, form, one)
        weight = None if query_weight is None else _per_token(query_weight, piece)
        d_weight = None if d_query_weight is None else _per_token(d_query_weight, piece)
        d_features = _query_gradient(
            piece, scratch, grad, queries, features, weight, angles, prepared[piece.states], d_prepared[piece.states],
            d_weight, form, kind,
        )  # fmt: skip
        d_q[piece.items, piece.tokens].transpose(1, 2).copy_(d_features)
    d_state = prepare_backward(d_prepared, state, prepared, form, kind)
    angles = _angles(key_cos, key_sin)
    width = k.shape[3]
    for piece in _pieces(k, v, cu_k):
        here = d_state[piece.states]
        keys, features = _features(k[piece.items, piece.tokens], scratch, form, one)
        values = _values(v[piece.items, piece.tokens], scratch, one)
        to_keys = F.pad(_used(here, one), (0, 0, 0, int(one)))  # a column to spare keeps complex numbers aligned
        if angles is not None and one:
            to_keys[..., :width, -1] = 0
        d_keys = _bmm(values, to_keys.mT, scratch, "d_features")
        d_features = d_keys[..., :width]
        if angles is not None:
            _rotate(d_features, angles.conj(), piece)
            if one:
                d_features.add_(here[..., None, :-1, -1])
        weight = None if key_weight is None else _per_token(key_weight, piece)
        if d_key_weight is not None:
            along = (keys[..., : width + one] * d_keys[..., : width + one]).sum(-1, keepdim=True)
            _per_token(d_key_weight, piece).copy_(along)
        rotated = _rotated(keys, width, angles, piece, scratch)
        d_rows = _bmm(rotated[..., : width + one], _used(here, one)[..., : v.shape[3]], scratch)
        d_features.mul_(_slope(features, form))
        if weight is not None:
            d_features.mul_(weight)
            d_rows.mul_(weight)
        d_k[piece.items, piece.tokens].transpose(1, 2).copy_(d_features)
        d_v[piece.items, piece.tokens].transpose(1, 2).copy_(d_rows)
    return d_q, d_k, d_v, d_key_weight, d_query_weight


def _weighed_rows(
    features: Tensor, prepared: Tensor, angles: Tensor | None, piece: Piece, form: Form, kind: str, scratch: Scratch
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """a, b and f' M of each token; the features are rotated in place."""
    z = None
    if angles is not None:
        z = (features * prepared[..., None, :-1, -1]).sum(-1, keepdim=True)
        _rotate(features, angles, piece)
    rows = _bmm(features, prepared[..., :-1, :], scratch)
    z = rows[..., -1:] if z is None else z
    a, b = row_weights(z, form, kind)
    return a, b, rows[..., :-1]


def _query_gradient(
    piece: Piece,
    scratch: Scratch,
    grad: Tensor,
    queries: Tensor,
    features: Tensor,
    weight: Tensor | None,
    angles: Tensor | None,
    prepared: Tensor,
    d_prepared: Tensor,
    d_weight: Tensor | None,
    form: Form,
    kind: str,
) -> Tensor:
    """Gradient of a piece's queries (b, H, n, D).

    Args:
        grad: (b, H, n, E + 1), or (b, H, n, E) of kind linear, gradient of the outputs; overwritten.
        d_prepared: added to.
        d_weight: gradient of the query weights, written.
    """
    one = kind != "linear"
    d_rows, d_z = grad[..., : prepared.shape[-1] - 1], grad[..., -1:]
    vector, constant = prepared[..., :-1, -1], prepared[..., -1:, :-1]
    width = features.shape[-1]
    rotated = _rotated(queries, width, angles, piece, scratch)
    a = b = slope = None
    weighed = weighs_rows(kind)
    if weighed or d_weight is not None:
        rows = _bmm(rotated[..., :width], prepared[..., :-1, :], scratch)
    if weighed:
        z = rows[..., -1:] if angles is None else (features * vector[..., None, :]).sum(-1, keepdim=True)
        (a, b), slope = row_weights(z, form, kind), row_slope(z, form, kind)
    along_constant = None
    if slope is not None or d_weight is not None:
        along_rows = rows[..., :-1].mul_(d_rows).sum(-1, keepdim=True)
    if has_constant(kind) and (weighed or d_weight is not None):
        along_constant = d_rows @ constant.mT
    if d_weight is not None:
        of_weight = along_rows if a is None else a * along_rows
        if along_constant is not None:
            of_weight = of_weight + (along_constant if b is None else b * along_constant)
        d_weight.copy_(of_weight)
    if weight is not None:
        d_rows.mul_(weight)
    of_constant = None if b is None else b.mT @ d_rows
    if a is not None:
        d_rows.mul_(a)
    if one:
        d_z.zero_()
    if slope is not None:
        d_z.addcmul_(slope, along_rows)
    if weighed and along_constant is not None:
        d_z.sub_(along_constant)
    if weighed and weight is not None:
        d_z.mul_(weight)
    sums = _bmm(rotated[..., : width + one].mT, grad, scratch, "sums")
    if of_constant is not None:
        sums[..., -1:, :-1] = of_constant
    if angles is None:
        d_features = _bmm(grad, _used(prepared, one)[..., :width, :].mT, scratch, "d_features")
    else:
        if weighed:
            sums[..., :-1, -1:] = features.mT @ d_z
        d_features = _bmm(d_rows, prepared[..., :-1, :-1].mT, scratch, "d_features")
        _rotate(d_features, angles.conj(), piece)
        if weighed:
            d_features.addcmul_(d_z, vector[..., None, :])
    _used(d_prepared, one).add_(sums)
    return d_features.mul_(_slope(features, form))


def _pieces(rows: Tensor, other: Tensor, cu: Tensor | None) -> Iterator[Piece]:
    """Cut (B, N, H, D), alone or packed, into pieces."""
    batch, tokens, heads = rows.shape[:3]
    width = max(1, heads * max(rows.shape[3], other.shape[3]))
    limit = max(1, _PIECE.get(rows.device.type, _LARGEST_PIECE) // width)
    if cu is not None:
        for segment, (start, end) in enumerate(pairwise(cu.tolist())):
            for first in range(start, end, limit):
                yield Piece(slice(0, 1), slice(first, min(first + limit, end)), slice(segment, segment + 1))
        return
    together = max(1, limit // max(1, tokens))
    for item in range(0, batch, together):
        items = slice(item, item + together)
        for first in range(0, tokens, limit):
            yield Piece(items, slice(first, first + limit), items)


def _features(x: Tensor, scratch: Scratch, form: Form, one: bool) -> tuple[Tensor, Tensor]:
    """Features of a piece (b, n, H, D), with ``one`` a column of ones and one to spare, and a view of them alone."""
    rows, out = scratch.with_one("features", x, one, spare=1)
    x = x.transpose(1, 2)
    if x.dtype != out.dtype or form.feature_map == "identity":
        x = out.copy_(x)
    if form.feature_map == "relu":
        torch.clamp_min(x, 0, out=out)
    elif form.feature_map == "leaky_relu":
        torch.ops.aten.leaky_relu.out(x, form.slope, out=out)
    elif form.feature_map == "elu_plus_one":
        torch.ops.aten.elu.out(x, out=out).add_(1)
    elif form.feature_map == "sigmoid":
        torch.sigmoid(x, out=out)
    elif form.feature_map == "exp":
        torch.mul(x, form.slope, out=out).exp_()
    return rows, out


def _values(x: Tensor, scratch: Scratch, one: bool) -> Tensor:
    """A piece (b, n, H, E) as (b, H, n, E + one), with ``one`` a column of ones."""
    rows, out = scratch.with_one("values", x, one)
    out.copy_(x.transpose(1, 2))
    return rows


def _slope(features: Tensor, form: Form) -> Tensor | float:
    """Derivative of the feature map, written over the features."""
    if form.feature_map == "relu":
        return features.sign_()
    if form.feature_map == "leaky_relu":
        return torch.where(features > 0, 1.0, form.slope)
    if form.feature_map == "elu_plus_one":
        return features.clamp_max_(1)
    if form.feature_map == "sigmoid":
        return torch.addcmul(features, features, features, value=-1, out=features)
    return features.mul_(form.slope) if form.feature_map == "exp" else 1.0


def _angles(cos: Tensor | None, sin: Tensor | None) -> Tensor | None:
    return None if cos is None or sin is None else torch.complex(cos, sin)


def _rotate(features: Tensor, angles: Tensor | None, piece: Piece) -> None:
    """Rotate neighbouring channels in place: as complex numbers that is one product."""
    if angles is not None:
        torch.view_as_complex(features.unflatten(-1, (-1, 2))).mul_(angles[piece.tokens])


def _rotated(rows: Tensor, width: int, angles: Tensor | None, piece: Piece, scratch: Scratch) -> Tensor:
    """Rows with their first ``width`` columns rotated, in a copy; themselves without angles."""
    if angles is None:
        return rows
    out = scratch.take("rotated", rows.shape).copy_(rows)
    _rotate(out[..., :width], angles, piece)
    return out


def _used(state: Tensor, one: bool) -> Tensor:
    """What of a state the columns of ones reach."""
    return state if one else state[..., :-1, :-1]


def _bmm(a: Tensor, b: Tensor, scratch: Scratch, name: str = "rows") -> Tensor:
    """``a @ b``, all (b, H, ., .), in scratch memory."""
    out = scratch.take(name, (*a.shape[:3], b.shape[3]))
    torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
    return out


def _per_token(weight: Tensor, piece: Piece) -> Tensor:
    """A piece of weights (B, N, H) as (b, H, n, 1)."""
    return weight[piece.items, piece.tokens].transpose(1, 2)[..., None]
