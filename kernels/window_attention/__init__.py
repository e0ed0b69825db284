"""Softmax attention within windows of a token map: adjacent tokens (Swin) or a grid of distant ones (MaxViT).

Liu et al., Swin Transformer, ICCV 2021 (arXiv:2103.14030); Tu et al., MaxViT, ECCV 2022 (2204.01697). Partition,
cyclic shift, padding and their reversal are arithmetic on addresses: no rearranged copy of the map is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import Choice, choose
from kernels.errors import InputError, unknown_name
from kernels.operators import autocast_to
from kernels.window_attention.operator import window_attention_forward
from kernels.window_attention.reference import window_attention_reference
from kernels.window_attention.relative_bias import relative_position_bias

__all__ = ["plan", "relative_position_bias", "window_attention"]

KINDS = ("window", "grid")
SHIFT_MASKS = ("hidden", "released")
PADDINGS = ("error", "hide", "zero")
LARGEST_HEAD = 256
LARGEST_FLOAT32_HEAD = 128  # exact products of wider ones do not fit the registers


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    *,
    kind: str = "window",
    shift: int | tuple[int, int] = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    shift_mask: str = "hidden",
    padding: str = "error",
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each token to the tokens of its window.

    Args:
        q, k: (B, H, W, heads, D), of any strides: views of one fused projection (B, H, W, 3, heads, D) are not copied.
        v: (B, H, W, heads, E).
        window_size: h and w, the tokens of a window, row by row.
        kind: ``window``: h x w adjacent tokens. ``grid``: h x w tokens that lie H / h and W / w apart.
        shift: rows and columns by which the map is rolled up and left before it is cut into windows (and back
            afterwards), each at least 0 and less than the window's side; for ``window`` alone. Tokens that come
            together only because the roll carried some of them around an edge do not see each other.
        bias: (heads, h w, h w), queries by keys, added to the scaled scores; :func:`relative_position_bias` makes it
            from a table. It may be -inf, and has a gradient.
        scale: of the scores; D^-0.5 by default.
        shift_mask: how tokens on two sides of an edge are kept apart. ``hidden``: exactly. ``released``: by -100 added
            to the score, as in the released code, which lets a little through where scores are large.
        padding: what happens when the window does not divide the map. ``error``: it is refused. Otherwise the map is
            extended at the bottom and at the right, before the shift. ``hide``: no token sees the extension. ``zero``:
            it is seen, as keys and values of zero with their share of the softmax; this is what Swin, DaViT and their
            like do, provided that their projection has no bias: they pad before it, and a bias then fills the
            extension (pad the map itself to reproduce that).
        return_lse: also return the log-sum-exp.

    Returns:
        out: (B, H, W, heads, E) in the dtype of ``q``; 0 where ``bias`` hides every key.
        lse: on request, (B, H, W, heads) float32 (float64 for float64), natural log-sum-exp of the scores; -inf where
            every key is hidden.

    Raises:
        InputError: shapes or options do not fit, or a backend is forced that cannot serve.
    """
    choice = plan(
        q,
        k,
        v,
        window_size,
        kind=kind,
        shift=shift,
        bias=bias,
        scale=scale,
        shift_mask=shift_mask,
        padding=padding,
        return_lse=return_lse,
        backend=backend,
    )
    q, k, v = autocast_to(q, k, v)
    scale = q.shape[4] ** -0.5 if scale is None else float(scale)
    window, offset = _pair(window_size), _pair(shift)
    options = (list(window), kind == "grid", list(offset), shift_mask == "released", padding != "zero", scale)
    if choice.backend == "reference":
        out, lse = window_attention_reference(q, k, v, bias, *options)
    else:
        out, lse = window_attention_forward(q, k, v, bias, *options, choice.backend)
    return (out, lse) if return_lse else out


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    *,
    kind: str = "window",
    shift: int | tuple[int, int] = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    shift_mask: str = "hidden",
    padding: str = "error",
    return_lse: bool = False,
    backend: str = "auto",
) -> Choice:
    """Check the arguments of :func:`window_attention` and say which implementation serves them."""
    if q.dim() != 5 or k.shape != q.shape or v.dim() != 5 or v.shape[:4] != q.shape[:4]:
        raise InputError(
            f"window_attention takes q and k (B, H, W, heads, D) and v (B, H, W, heads, E); got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}."
        )
    for what, name, known in (
        ("kind", kind, KINDS),
        ("shift_mask", shift_mask, SHIFT_MASKS),
        ("padding", padding, PADDINGS),
    ):
        if name not in known:
            raise unknown_name(f"window_attention: {what}", name, known)
    window, offset = _pair(window_size), _pair(shift)
    if min(window) < 1:
        raise InputError(f"window_attention: window_size must be at least 1 on both axes; got {window}.")
    if any(not 0 <= s < w for s, w in zip(offset, window, strict=True)):
        raise InputError(f"window_attention: shift {offset} must be at least 0 and less than the window, {window}.")
    if kind == "grid" and any(offset):
        raise InputError(f"window_attention: kind='grid' takes no shift; got {offset}.")
    size = (q.shape[1], q.shape[2])
    if padding == "error" and any(n % w for n, w in zip(size, window, strict=True)):
        raise InputError(
            f"window_attention: the window {window[0]} x {window[1]} does not divide the map {size[0]} x {size[1]}; "
            "take another window, or padding='hide' or 'zero'."
        )
    tokens = window[0] * window[1]
    if bias is not None and bias.shape != (q.shape[3], tokens, tokens):
        raise InputError(
            f"window_attention: bias must be (heads, tokens, tokens) = {(q.shape[3], tokens, tokens)}; "
            f"got {tuple(bias.shape)}."
        )
    largest = max(q.shape[4], v.shape[4])
    most = LARGEST_FLOAT32_HEAD if q.dtype == torch.float32 else LARGEST_HEAD
    refusal = f"heads are {largest} wide and the kernels take up to {most} of {_name(q)}" if largest > most else None
    return choose("window_attention", backend, (q, k, v), refusal)


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """One number for both axes, or one for each."""
    rows, columns = (value, value) if isinstance(value, int) else value
    return rows, columns
