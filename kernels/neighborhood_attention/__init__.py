"""Neighbourhood attention: every token attends to the window of tokens around it, on 1-D, 2-D and 3-D grids.

Hassani et al., Neighborhood Attention Transformer, CVPR 2023 (arXiv:2204.07143), with the dilation of Dilated
Neighborhood Attention Transformer (2209.15001) and the stride of Generalized Neighborhood Attention (2504.16922). Which
keys a query sees is defined in :mod:`kernels.windows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from kernels.backend import Choice, choose
from kernels.checks import check_dtypes
from kernels.errors import InputError
from kernels.neighborhood_attention.fit import Fit, fit_window
from kernels.neighborhood_attention.operator import neighborhood_attention_forward
from kernels.neighborhood_attention.reference import neighborhood_attention_reference
from kernels.operators import autocast_to
from kernels.windows import PerAxis, Window, window

__all__ = ["Fit", "fit_window", "neighborhood_attention", "plan"]

LARGEST_HEAD = 256


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    heads_first: bool = False,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    heads_first: bool = False,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    heads_first: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to the window of keys around it.

    Args:
        q: (B, *grid, H, D) queries; the grid has one to three axes.
        k: (B, *grid, G, D) keys; H is a multiple of G, and each key head serves H / G neighbouring query heads.
        v: (B, *grid, G, E) values.
        kernel_size: keys of a window on each axis, at least 2; even sizes reach one further to the left.
        stride: this many neighbouring queries share a window; 1 to ``kernel_size``.
        dilation: distance between the keys of a window; ``kernel_size * dilation`` is at most the axis's length
            (:func:`fit_window` adapts a window to a small map).
        is_causal: the window ends at the query.
        rpb: (H, 2k-1, ...) relative position bias, one axis per grid axis, indexed by key minus query in steps of the
            dilation plus k-1, and added to the scaled scores. (Swin's are indexed by query minus key: flip them.)
        scale: of the scores; D^-0.5 by default.
        heads_first: all tensors have their heads before the grid, (B, H, *grid, D); nothing is copied for it.
        return_lse: also return the log-sum-exp, to merge the result with attention to further keys.

    Every setting is one value or one per axis.

    Returns:
        out: (B, *grid, H, E) in the dtype of ``q``.
        lse: (B, *grid, H) float32 (float64 for float64), natural log-sum-exp of the scores; only on request.

    Raises:
        InputError: shapes or settings do not fit, or a backend is forced that cannot serve.
    """
    choice, frame = _settle(q, k, v, kernel_size, stride, dilation, is_causal, rpb, heads_first, backend)
    q, k, v = autocast_to(q, k, v)
    if heads_first:
        q, k, v = (t.movedim(1, -2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if choice.backend == "reference":
        out, lse = neighborhood_attention_reference(q, k, v, rpb, frame, scale)
    else:
        settings = ([getattr(axis, name) for axis in frame.axes] for name in ("kernel", "stride", "dilation", "causal"))
        out, lse = neighborhood_attention_forward(q, k, v, rpb, *settings, scale, choice.backend)
    if heads_first:
        out, lse = out.movedim(-2, 1), lse.movedim(-1, 1)
    return (out, lse) if return_lse else out


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    heads_first: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Choice:
    """Check the arguments of :func:`neighborhood_attention` and say which implementation serves them."""
    return _settle(q, k, v, kernel_size, stride, dilation, is_causal, rpb, heads_first, backend)[0]


def _settle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis,
    dilation: PerAxis,
    is_causal: bool | Sequence[bool],
    rpb: Tensor | None,
    heads_first: bool,
    backend: str,
) -> tuple[Choice, Window]:
    layout = "(B, heads, *grid, width)" if heads_first else "(B, *grid, heads, width)"
    if not q.dim() == k.dim() == v.dim() or not 4 <= q.dim() <= 6:
        raise InputError(
            f"neighborhood_attention takes q, k, v as {layout} with a grid of one to three axes; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    check_dtypes("neighborhood_attention", q=q, k=k, v=v)
    q_shape, k_shape, v_shape = (
        (t.shape[0], *t.shape[2:-1], t.shape[1], t.shape[-1]) if heads_first else tuple(t.shape) for t in (q, k, v)
    )
    if not q_shape[:-2] == k_shape[:-2] == v_shape[:-2] or q_shape[-1] != k_shape[-1] or k_shape[-2] != v_shape[-2]:
        raise InputError(
            f"neighborhood_attention: q, k, v as {layout} share batch and grid, q and k their width, k and v their "
            f"heads; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    heads, key_heads = q_shape[-2], k_shape[-2]
    if key_heads == 0 or heads % key_heads:
        raise InputError(f"neighborhood_attention: {heads} query heads are not a multiple of {key_heads} key heads.")
    frame = window(q_shape[1:-2], kernel_size, stride, dilation, is_causal)
    table = (heads, *(2 * size - 1 for size in frame.kernel))
    if rpb is not None and rpb.shape != table:
        raise InputError(f"neighborhood_attention: rpb must be (H, 2k-1, ...) = {table}; got {tuple(rpb.shape)}.")
    largest = max(q_shape[-1], v_shape[-1])
    refusal = f"heads are {largest} wide and the kernels take up to {LARGEST_HEAD}" if largest > LARGEST_HEAD else None
    return choose("neighborhood_attention", backend, (q, k, v, rpb), refusal), frame
