"""Products of every token with its window: weighted sums, logits, and dynamic convolutions made of them.

:func:`neighborhood_av` and :func:`neighborhood_qk` are the two halves of neighbourhood attention (Hassani et al., CVPR
2023, arXiv:2204.07143) for models that do something to the weights in between, and each other's gradients.
:func:`dynamic_conv` applies to every position its own kernel, as ContMix (OverLoCK, CVPR 2025, arXiv:2502.20087) and
involution (CVPR 2021, arXiv:2103.06255) do; :func:`outlook` is the outlook attention of VOLO (arXiv:2106.13112).

Windows, 1-D to 3-D, are enumerated row-major. ``padding="shift"`` moves a window inwards at a border, so that it always
holds as many tokens as it has taps (:mod:`kernels.windows`); ``padding="zero"`` keeps it centred and reads zeros
beyond the grid. An even window has one tap more before the token than after it.
"""

from __future__ import annotations

from torch import Tensor

from kernels.backend import Choice, choose
from kernels.dynamic_conv.operator import (
    grid_of,
    heads_first_view,
    neighborhood_av_forward,
    neighborhood_qk_forward,
)
from kernels.dynamic_conv.outlook import FoldWeights
from kernels.dynamic_conv.reference import outlook_reference, products_reference, weighted_sum_reference
from kernels.dynamic_conv.taps import Taps, taps
from kernels.errors import InputError
from kernels.operators import autocast_to, autocasting
from kernels.windows import PerAxis

__all__ = [
    "dynamic_conv",
    "neighborhood_av",
    "neighborhood_qk",
    "outlook",
    "plan",
    "plan_av",
    "plan_outlook",
    "plan_qk",
]

LARGEST_HEAD = 256


# ------------------------------------------------------------------------------------------------------- weighted sums


def neighborhood_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    *,
    dilation: PerAxis = 1,
    padding: str = "shift",
    heads_first: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Sum of each window's values with given weights: ``out[i] = sum over taps p of attn[i, p] value[token(i, p)]``.

    Args:
        attn: (B, H, *grid, P) weights, P the taps of a window; they are used as they are.
        value: (B, H, *grid, D).
        kernel_size, dilation: of the window, one value or one per axis.
        padding: ``shift`` or ``zero``; with ``shift``, ``kernel_size * dilation`` must not exceed the grid.
        heads_first: false when all tensors have the heads after the grid, (B, *grid, H, P) and (B, *grid, H, D).

    Returns:
        (B, H, *grid, D), or (B, *grid, H, D), in the dtype of ``value``.

    Raises:
        InputError: shapes do not fit, the window does not fit the grid, or a backend is forced that cannot serve.
    """
    choice = plan_av(
        attn, value, kernel_size, dilation=dilation, padding=padding, heads_first=heads_first, backend=backend
    )
    window = taps(grid_of(value, heads_first), kernel_size, dilation, padding)
    attn, value = autocast_to(attn, value)
    return _weighted_sum(attn, value, window, heads_first, choice.backend)


def _weighted_sum(attn: Tensor, value: Tensor, window: Taps, heads_first: bool, backend: str) -> Tensor:
    if backend == "reference":
        out = weighted_sum_reference(heads_first_view(attn, heads_first), heads_first_view(value, heads_first), window)
        return out if heads_first else out.movedim(1, -2)
    return neighborhood_av_forward(
        attn, value, list(window.kernel), list(window.dilation), _padding(window), heads_first, backend
    )


def plan_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    *,
    dilation: PerAxis = 1,
    padding: str = "shift",
    heads_first: bool = True,
    backend: str = "auto",
) -> Choice:
    """Check the arguments of :func:`neighborhood_av` and say which implementation serves them."""
    layout = "(B, H, *grid, {})" if heads_first else "(B, *grid, H, {})"
    _check_rows("neighborhood_av", value)
    window = taps(grid_of(value, heads_first), kernel_size, dilation, padding)
    if attn.shape != (*value.shape[:-1], window.size):
        raise InputError(
            f"neighborhood_av takes attn {layout.format('P')} with P = {window.size} taps and value "
            f"{layout.format('D')}; got {tuple(attn.shape)} and {tuple(value.shape)}."
        )
    _check_dtypes("neighborhood_av", attn, value)
    return choose("neighborhood_av", backend, (attn, value), _refusal(value.shape[-1]))


# -------------------------------------------------------------------------------------------------------------- logits


def neighborhood_qk(
    q: Tensor,
    k: Tensor,
    kernel_size: PerAxis,
    *,
    dilation: PerAxis = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
    padding: str = "shift",
    heads_first: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Logits of every query against its window: ``scale * q[i] . k[token(i, p)] + rpb[token(i, p) - i]``.

    Args:
        q, k: (B, H, *grid, D).
        kernel_size, dilation: of the window, one value or one per axis.
        rpb: (H, 2 k - 1 per axis) table of relative positions, key minus query in steps of the dilation, from
            1 - k on; added unscaled.
        scale: of the products; D^-0.5 by default.
        padding: ``shift`` or ``zero``; with ``zero``, a key beyond the grid is a zero: its logit is its bias.
        heads_first: false when all tensors have the heads after the grid.

    Returns:
        (B, H, *grid, P), or (B, *grid, H, P), in the dtype of ``q``; P the taps of a window.

    Raises:
        InputError: shapes do not fit, the window does not fit the grid, or a backend is forced that cannot serve.
    """
    choice = plan_qk(
        q,
        k,
        kernel_size,
        dilation=dilation,
        rpb=rpb,
        scale=scale,
        padding=padding,
        heads_first=heads_first,
        backend=backend,
    )
    window = taps(grid_of(q, heads_first), kernel_size, dilation, padding)
    q, k = autocast_to(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if choice.backend == "reference":
        out = products_reference(heads_first_view(q, heads_first), heads_first_view(k, heads_first), rpb, scale, window)
        return out if heads_first else out.movedim(1, -2)
    return neighborhood_qk_forward(
        q, k, rpb, scale, list(window.kernel), list(window.dilation), _padding(window), heads_first, choice.backend
    )


def plan_qk(
    q: Tensor,
    k: Tensor,
    kernel_size: PerAxis,
    *,
    dilation: PerAxis = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
    padding: str = "shift",
    heads_first: bool = True,
    backend: str = "auto",
) -> Choice:
    """Check the arguments of :func:`neighborhood_qk` and say which implementation serves them."""
    _check_rows("neighborhood_qk", q)
    if q.shape != k.shape:
        raise InputError(f"neighborhood_qk takes q and k of one shape; got {tuple(q.shape)} and {tuple(k.shape)}.")
    window = taps(grid_of(q, heads_first), kernel_size, dilation, padding)
    expected = (q.shape[1 if heads_first else -2], *window.table)
    if rpb is not None and rpb.shape != expected:
        raise InputError(
            f"neighborhood_qk: rpb must be (heads, 2 k - 1 per axis) = {expected}; got {tuple(rpb.shape)}."
        )
    _check_dtypes("neighborhood_qk", q, k)
    return choose("neighborhood_qk", backend, (q, k, rpb), _refusal(q.shape[-1]))


# ------------------------------------------------------------------------------------------------------- convolutions


def dynamic_conv(
    value: Tensor,
    weights: Tensor,
    kernel_size: PerAxis,
    *,
    dilation: PerAxis = 1,
    padding: str = "shift",
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution with a kernel of its own at every position, shared by the channels of a group.

    ContMix takes ``padding="shift"``; involution and MSA-Conv, which unfold, take ``padding="zero"``.

    Args:
        value: (B, C, *grid); channels-last strides are the fast layout, others are copied into it.
        weights: (B, G, *grid, P), P the taps of a window; group g weighs channels g C / G to (g + 1) C / G - 1.
            A (B, G, P, *grid) tensor of channels-first kernels goes in as ``weights.movedim(2, -1)``.
        kernel_size, dilation: of the window, one value or one per axis.
        padding: ``shift`` or ``zero``.

    Returns:
        (B, C, *grid) in the dtype of ``value``, channels-last where ``value`` is.

    Raises:
        InputError: shapes do not fit, the window does not fit the grid, or a backend is forced that cannot serve.
    """
    choice = plan(value, weights, kernel_size, dilation=dilation, padding=padding, backend=backend)
    window = taps(value.shape[2:], kernel_size, dilation, padding)
    weights, value = autocast_to(weights, value)
    groups = weights.shape[1]
    if value.stride(1) == 1:
        rows = value.movedim(1, -1).unflatten(-1, (groups, -1))  # (B, *grid, G, D), a view
        out = _weighted_sum(weights.movedim(1, -2), rows, window, False, choice.backend)
        return out.flatten(-2).movedim(-1, 1)
    rows = value.unflatten(1, (groups, -1)).movedim(2, -1)
    out = _weighted_sum(weights, rows, window, True, choice.backend)
    return out.movedim(-1, 2).flatten(1, 2)


def plan(
    value: Tensor,
    weights: Tensor,
    kernel_size: PerAxis,
    *,
    dilation: PerAxis = 1,
    padding: str = "shift",
    backend: str = "auto",
) -> Choice:
    """Check the arguments of :func:`dynamic_conv` and say which implementation serves them."""
    if not 3 <= value.dim() <= 5:
        raise InputError(f"dynamic_conv takes value (B, C, *grid) with 1 to 3 axes; got {tuple(value.shape)}.")
    window = taps(value.shape[2:], kernel_size, dilation, padding)
    batch, channels, *grid = value.shape
    if weights.dim() != value.dim() + 1 or weights.shape != (batch, weights.shape[1], *grid, window.size):
        raise InputError(
            f"dynamic_conv takes weights (B, G, *grid, P) = {(batch, 'G', *grid, window.size)} for value "
            f"{tuple(value.shape)}; got {tuple(weights.shape)}."
        )
    groups = weights.shape[1]
    if groups == 0 or channels % groups:
        raise InputError(f"dynamic_conv: {channels} channels are not a multiple of {groups} groups.")
    _check_dtypes("dynamic_conv", weights, value)
    return choose("dynamic_conv", backend, (weights, value), _refusal(channels // groups))


def outlook(
    attn: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    stride: int = 1,
    padding: int | tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Outlook attention's mixing, ``fold(attn unfold(v))``: each patch by its own matrix, summed where patches overlap.

    Patches and folding never come to be: the matrices of the patches that overlap at a token are summed into one window
    of ``2 K - 1`` tokens around it, which is a zero-padded :func:`neighborhood_av`.

    Args:
        attn: (B, H, h, w, P, P) weights, P = K K; row p of a patch's matrix makes its p-th place. They are used as they
            are: softmax and scale are the caller's.
        value: (B, H, height, width, D).
        kernel_size: K, one value or one per axis.
        stride: tokens between patches.
        padding: zeros around the map; ``K // 2`` by default. Patch (0, 0) starts at token (-padding, -padding).

    Returns:
        (B, H, height, width, D); what a patch makes beyond the map is dropped.

    Raises:
        InputError: shapes do not fit, or a backend is forced that cannot serve.
    """
    choice = plan_outlook(attn, value, kernel_size, stride=stride, padding=padding, backend=backend)
    kernel, margin = _outlook_window(kernel_size, padding)
    grid = (value.shape[2], value.shape[3])
    if choice.backend == "reference":
        attn, value = autocast_to(attn, value)
        return outlook_reference(attn, value, kernel, stride, margin)
    # Weights are summed in the dtype they come in, which under autocast is that of the softmax, float32.
    weights, value = autocast_to(FoldWeights.apply(attn, grid, kernel, stride, margin), value)
    window = taps(grid, (2 * kernel[0] - 1, 2 * kernel[1] - 1), 1, "zero")
    return _weighted_sum(weights, value, window, True, choice.backend)


def plan_outlook(
    attn: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    stride: int = 1,
    padding: int | tuple[int, int] | None = None,
    backend: str = "auto",
) -> Choice:
    """Check the arguments of :func:`outlook` and say which implementation serves them."""
    kernel, margin = _outlook_window(kernel_size, padding)
    if value.dim() != 5 or stride < 1:
        raise InputError(f"outlook takes value (B, H, height, width, D) and stride >= 1; got {tuple(value.shape)}.")
    grid = (value.shape[2], value.shape[3])
    patches = [max((n + 2 * m - k) // stride + 1, 0) for n, m, k in zip(grid, margin, kernel, strict=True)]
    size = kernel[0] * kernel[1]
    if attn.shape != (*value.shape[:2], *patches, size, size):
        raise InputError(
            f"outlook takes attn (B, H, h, w, P, P) = {(*value.shape[:2], *patches, size, size)} for value "
            f"{tuple(value.shape)}, kernel_size={kernel}, stride={stride}, padding={margin}; got {tuple(attn.shape)}."
        )
    _check_dtypes("outlook", attn, value)
    return choose("outlook", backend, (attn, value), _refusal(value.shape[-1]))


def _outlook_window(
    kernel_size: int | tuple[int, int], padding: int | tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Kernel and padding, one of each per axis."""
    kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else (kernel_size[0], kernel_size[1])
    margin = padding if padding is not None else (kernel[0] // 2, kernel[1] // 2)
    return kernel, (margin, margin) if isinstance(margin, int) else margin


# -------------------------------------------------------------------------------------------------------------- shared


def _padding(window: Taps) -> str:
    return "zero" if window.zero else "shift"


def _check_rows(name: str, rows: Tensor) -> None:
    if not 4 <= rows.dim() <= 6:
        raise InputError(
            f"{name} takes (B, H, *grid, D), or (B, *grid, H, D) with heads_first=False, and a grid of 1 to 3 axes; "
            f"got {tuple(rows.shape)}."
        )


def _check_dtypes(name: str, a: Tensor, b: Tensor) -> None:
    if a.dtype != b.dtype and not autocasting(a):
        raise InputError(f"{name}: tensors are {a.dtype} and {b.dtype}; cast one to the other's dtype.")


def _refusal(width: int) -> str | None:
    return f"heads are {width} wide and the kernels take up to {LARGEST_HEAD}" if width > LARGEST_HEAD else None
