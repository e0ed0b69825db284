"""Checks of arguments that several operators share; each error is one sentence for whoever calls the operator.

Values are looked at on the CPU alone: reading a tensor back from a GPU would wait for it, and while a graph is captured
there is nothing to read. There the caller is trusted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.errors import InputError
from kernels.operators import autocasting


def check_dtypes(operator: str, **tensors: Tensor) -> None:
    """Refuse tensors that are not of one floating-point dtype; autocast makes them so itself.

    Raises:
        InputError: some are not floating-point, or their dtypes differ.
    """
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    floating = all(dtype.is_floating_point for dtype in kinds.values())
    if not floating or (len(set(kinds.values())) > 1 and not autocasting(next(iter(tensors.values())))):
        given = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in kinds.items())
        raise InputError(f"{operator} takes floating-point tensors of one dtype; got {given}.")


def check_cuts(operator: str, name: str, cuts: Tensor, total: int) -> None:
    """Refuse boundaries (S + 1,) of packed segments that do not rise from 0 to the ``total`` number of rows.

    Raises:
        InputError: they are not whole numbers, or do not fit.
    """
    if cuts.dtype not in (torch.int32, torch.int64):
        raise InputError(f"{operator}: {name} must be int32 or int64; got {str(cuts.dtype).removeprefix('torch.')}.")
    if not _readable(cuts):
        return
    edges = cuts.tolist()
    falls = next((i for i in range(1, len(edges)) if edges[i] < edges[i - 1]), None)
    if falls is not None:
        raise InputError(f"{operator}: {name} must not fall; entry {falls} is {edges[falls]} after {edges[falls - 1]}.")
    if edges[0] != 0 or edges[-1] != total:
        raise InputError(
            f"{operator}: {name} must go from 0 to the {total} packed rows; it goes from {edges[0]} to {edges[-1]}."
        )


def check_indices(operator: str, name: str, indices: Tensor, count: int) -> None:
    """Refuse indices outside 0 to ``count - 1``.

    Raises:
        InputError: some are.
    """
    if not _readable(indices) or indices.numel() == 0:
        return
    low, high = (int(value) for value in indices.aminmax())
    if low < 0 or high >= count:
        raise InputError(f"{operator}: {name} must be from 0 to {count - 1}; it goes from {low} to {high}.")


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
