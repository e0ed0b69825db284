"""What every gate takes and returns: a feature map in, the same map weighted by its own statistics out."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from attention.base import AttentionModule
from kernels.errors import InputError


class Gate(AttentionModule):
    """Base of the gates: feature maps (B, C, *spatial) in and out, of any size at least 1 on each axis.

    A subclass sets ``about`` and ``grids``, and implements :meth:`apply_gate` and :meth:`cost`. Its constructor takes
    ``dim`` first.
    """

    grids: ClassVar[tuple[int, ...]] = (2,)
    """How many spatial axes a map may have: 2 for images, 3 for volumes (and 1 for signals)."""
    takes_signal: ClassVar[bool] = False
    """Whether a second map may say where to look."""
    takes_half: ClassVar[bool] = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise InputError(f"attention '{self.name}': dim={dim} must be at least 1.")
        self.dim = dim

    def forward(
        self, x: Tensor, signal: Tensor | None = None, *, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Weight ``x``.

        Args:
            x: (B, C, *spatial).
            signal: for gates that take one, the map (B, C', *spatial') that decides, such as a decoder's.
            return_attention: also return the weights.

        Returns:
            The output, of the shape of ``x``; on request also what ``x`` was multiplied by, broadcastable to its shape
            (a gate that does something else says what it returns).

        Raises:
            InputError: shapes or dtypes do not fit, or there is a signal that the gate does not take.
        """
        if x.dim() - 2 not in self.grids or x.shape[1] != self.dim or min(x.shape[2:], default=1) < 1:
            takes = " or ".join(f"(B, {self.dim}, {', '.join('DHW'[-axes:])})" for axes in self.grids)
            raise InputError(f"attention '{self.name}' takes {takes}, every axis at least 1; got {tuple(x.shape)}.")
        if signal is not None and not self.takes_signal:
            raise InputError(f"attention '{self.name}' looks at its own input alone and takes no signal.")
        if not self.takes_half and x.dtype in (torch.float16, torch.bfloat16):
            raise InputError(
                f"attention '{self.name}' does not work in {str(x.dtype).removeprefix('torch.')}; keep it in float32."
            )
        out, weights = self.apply_gate(x, signal)
        return (out, weights) if return_attention else out

    def apply_gate(self, x: Tensor, signal: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and weights for checked arguments."""
        raise NotImplementedError
