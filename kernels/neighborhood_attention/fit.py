"""What to do with a map that is smaller than the window: fail, pad it, or make the window smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernels.errors import InputError, unknown_name

POLICIES = ("error", "pad", "clamp_dilation", "clamp_kernel")


@dataclass(frozen=True)
class Fit:
    """A window that fits.

    Attributes:
        kernel_size, dilation: of the window, one per axis.
        padding: positions to add at the end of each axis.
    """

    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]


def fit_window(
    grid: Sequence[int], kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1, policy: str = "error"
) -> Fit:
    """Make ``kernel_size * dilation`` at most the length of every axis.

    Args:
        policy: ``error``; ``pad`` lengthens the map (what layers of NATTEN before 0.17 did with zeros on their input,
            so that padded tokens are keys as well: their checkpoints were trained with it); ``clamp_dilation`` lowers
            the dilation to what fits, at least 1; ``clamp_kernel`` lowers the kernel.

    Raises:
        InputError: the window does not fit and the policy is ``error``, or what it may change does not suffice.

    >>> fit_window((20, 40), 7, 4, "clamp_dilation")
    Fit(kernel_size=(7, 7), dilation=(2, 4), padding=(0, 0))
    """
    if policy not in POLICIES:
        raise unknown_name("policy", policy, POLICIES)
    lengths = tuple(grid)
    k, d = ((value,) * len(lengths) if isinstance(value, int) else tuple(value) for value in (kernel_size, dilation))
    if not len(k) == len(d) == len(lengths) or min(*k, *d, *lengths) < 1:
        raise InputError(f"fit_window: kernel_size={k} and dilation={d} must be positive, one per axis of {lengths}.")
    padding = (0,) * len(lengths)
    if policy == "pad":
        padding = tuple(max(kk * dd - n, 0) for kk, dd, n in zip(k, d, lengths, strict=True))
    elif policy == "clamp_dilation":
        d = tuple(max(1, min(dd, n // kk)) for kk, dd, n in zip(k, d, lengths, strict=True))
    elif policy == "clamp_kernel":
        k = tuple(min(kk, n // dd) for kk, dd, n in zip(k, d, lengths, strict=True))
    longer = tuple(n + p for n, p in zip(lengths, padding, strict=True))
    if any(kk < 2 or kk * dd > n for kk, dd, n in zip(k, d, longer, strict=True)):
        raise InputError(
            f"kernel_size={k} with dilation={d} does not fit a map of {lengths} tokens under the policy '{policy}'; "
            "take a smaller window or another policy."
        )
    return Fit(k, d, padding)
