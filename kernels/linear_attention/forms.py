"""The parameters of linear attention and what its normalisers do to the reduced state.

The state of a head is ``[[S, g], [t, n]]``, (D + 1, E + 1): the sums of :func:`linear_attention_2pass` with the keys'
features and a 1 along the rows, the values and a 1 along the columns. A normaliser first turns it into what the second
pass applies, ``[[M, m], [c, -]]`` (:func:`prepare`), and then weighs each token's row by ``z = f.m``:

    out = a(z) f' M + b(z) c

======== =========================== ============== ===================== =======
kind     M                           m              a                     b
======== =========================== ============== ===================== =======
linear   scale S                                    1                     0
affine   (scale / n) (S - g t^T / n)                1                     1
shift    scale S / n                 scale g / n    1                     1 - z
mala     scale S / n                 scale g / n    1 + 1 / (z + eps)     -z
ratio    scale S                     g              1 / (z + eps)         0
floor    scale S                     g              1 / max(z, eps)       0
======== =========================== ============== ===================== =======

with c = t / n. ``channel`` is of kind linear with its own M; ``inline`` is affine in the features as long as nothing
rotates them, which saves the inner product z, and of kind shift otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Normaliser(NamedTuple):
    """Defaults of one normaliser: ``per_width`` scales by D^-0.5 instead of 1."""

    kind: str
    per_width: bool = False
    eps: float | None = None


NORMALISERS = {
    "none": Normaliser("linear"),
    "sum": Normaliser("ratio", eps=1e-6),
    "l2vit": Normaliser("floor", eps=100.0),
    "inline": Normaliser("affine", per_width=True),
    "mala": Normaliser("mala", per_width=True, eps=1e-6),
    "channel": Normaliser("linear", per_width=True),
}

# Each feature map's default slope, None where it has none.
FEATURE_MAPS: dict[str, float | None] = {
    "identity": None,
    "relu": None,
    "leaky_relu": 0.01,
    "elu_plus_one": None,
    "sigmoid": None,
    "exp": 1.0,
}


class Form(NamedTuple):
    """What is computed; every value is set."""

    normaliser: str
    feature_map: str
    slope: float
    scale: float
    eps: float

    @classmethod
    def of(
        cls, normaliser: str, feature_map: str, slope: float | None, scale: float | None, eps: float | None, width: int
    ) -> Form:
        """With defaults filled in, for heads ``width`` wide."""
        about = NORMALISERS[normaliser]
        if scale is None:
            scale = max(width, 1) ** -0.5 if about.per_width else 1.0
        slope = FEATURE_MAPS[feature_map] if slope is None else slope
        eps = about.eps if eps is None else eps
        return cls(normaliser, feature_map, float(slope or 0), float(scale), float(eps or 0))

    def kind(self, rotated: bool) -> str:
        """How rows are weighed; see the module."""
        kind = NORMALISERS[self.normaliser].kind
        return "shift" if kind == "affine" and rotated else kind


def weighs_rows(kind: str) -> bool:
    """Whether rows are weighed by z, which needs m."""
    return kind in ("shift", "mala", "ratio", "floor")


def has_constant(kind: str) -> bool:
    """Whether c enters the output."""
    return kind in ("affine", "shift", "mala")


def prepare(state: Tensor, form: Form, kind: str) -> Tensor:
    """``[[M, m], [c, -]]`` from ``[[S, g], [t, n]]``, both (..., D + 1, E + 1)."""
    sums, keys, values, count = _parts(state)
    out = torch.zeros_like(state)
    matrix, vector, constant, _ = _parts(out)
    if form.normaliser == "channel":
        matrix.copy_((sums * form.scale).softmax(-2).mul_(count != 0))
        return out
    per_key = _inverse(count) if has_constant(kind) else torch.ones_like(count)
    if has_constant(kind):
        torch.mul(values, per_key, out=constant)
    matrix.copy_(torch.addcmul(sums, keys, constant, value=-1) if kind == "affine" else sums)
    matrix.mul_(per_key).mul_(form.scale)
    if kind in ("shift", "mala"):
        vector.copy_(keys * per_key * form.scale)
    elif weighs_rows(kind):
        vector.copy_(keys)
    return out


def prepare_backward(grad: Tensor, state: Tensor, prepared: Tensor, form: Form, kind: str) -> Tensor:
    """Gradient of the state from that of what :func:`prepare` made of it; its corner is ignored."""
    _, keys, _, count = _parts(state)
    d_matrix, d_vector, d_constant, _ = _parts(grad)
    matrix, vector, constant, _ = _parts(prepared)
    out = torch.zeros_like(state)
    d_sums, d_keys, d_values, d_count = _parts(out)
    if form.normaliser == "channel":
        product = matrix * d_matrix
        d_sums.copy_(torch.addcmul(product, matrix, product.sum(-2, keepdim=True), value=-1).mul_(form.scale))
        return out
    per_key = _inverse(count) if has_constant(kind) else torch.ones_like(count)
    torch.mul(d_matrix, per_key * form.scale, out=d_sums)
    if kind in ("ratio", "floor"):
        d_keys.copy_(d_vector)
    if not has_constant(kind):
        return out
    from_count = (d_matrix * matrix).sum((-2, -1), keepdim=True)
    if kind == "affine":
        d_constant = d_constant - keys.mT @ d_sums
        d_keys.copy_(-(d_sums @ constant.mT))
    else:
        torch.mul(d_vector, per_key * form.scale, out=d_keys)
        from_count = from_count + (d_vector * vector).sum(-2, keepdim=True)
    torch.mul(d_constant, per_key, out=d_values)
    from_count = from_count + (d_constant * constant).sum(-1, keepdim=True)
    d_count.copy_(-from_count * per_key)
    return out


def row_weights(z: Tensor, form: Form, kind: str) -> tuple[Tensor | None, Tensor | None]:
    """a and b of each row, None where they are 1 and 0."""
    if kind == "shift":
        return None, 1 - z
    if kind == "mala":
        return (z + form.eps).reciprocal_().add_(1), -z
    if kind == "ratio":
        return (z + form.eps).reciprocal_(), None
    return z.clamp_min(form.eps).reciprocal_(), None


def row_slope(z: Tensor, form: Form, kind: str) -> Tensor | None:
    """Derivative of a by z; that of b, where there is one, is -1."""
    if kind == "shift":
        return None
    if kind == "floor":
        return -(z.clamp_min(form.eps).pow(-2)) * (z >= form.eps)
    return -((z + form.eps).pow(-2))


def _parts(state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views: (D, E) matrix, (D, 1) column, (1, E) row, (1, 1) corner."""
    return state[..., :-1, :-1], state[..., :-1, -1:], state[..., -1:, :-1], state[..., -1:, -1:]


def _inverse(count: Tensor) -> Tensor:
    """1 / n, 0 where there is no key."""
    return count.reciprocal().masked_fill_(count == 0, 0)
