"""Windowed products as products with a sparse matrix, whose non-zeros are the windows: the CPU's fast path.

A head's weights (N, P) are the values of an N x M matrix in compressed rows whose row i has its non-zeros at the tokens
of window i; they lie in memory in just that order, so that the matrix is made without moving a number. Nothing is
multiplied that is not in a window, nothing is gathered, and the pattern depends on sizes alone. The transposed matrix
takes one gather of the weights.
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor

from kernels.dynamic_conv.taps import Taps
from kernels.tables import made_once

# Heads are stacked as a block diagonal until their windows have this many taps: enough to fill the threads, and a
# pattern of 2 MB.
TAPS_AT_ONCE = 1 << 19
MOST_TAPS = 1 << 31  # of a head; places in a pattern are int32


@made_once(1)
def available() -> bool:
    """Whether this PyTorch has fast sparse products: those of MKL, which its Linux builds for x86 have."""
    if not sys.platform.startswith("linux") or not torch.backends.mkl.is_available():
        return False
    with warnings.catch_warnings():  # PyTorch says once that compressed rows are in beta
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1))
    return True


def heads_at_once(taps: Taps) -> int:
    """How many heads the functions below are best given."""
    return max(TAPS_AT_ONCE // (taps.tokens * taps.size), 1)


def weighted_sum(weights: Tensor, rows: Tensor, taps: Taps) -> Tensor:
    """(b, N, P) and (b, M, D) to (b, N, D)."""
    matrix = _matrix(weights.flatten(), *_pattern(taps, heads_at_once(taps)), len(weights), taps.tokens, rows.shape[1])
    return (matrix @ rows.flatten(0, 1)).view(len(weights), taps.tokens, -1)


def transposed_sum(weights: Tensor, rows: Tensor, taps: Taps) -> Tensor:
    """(b, N, P) and (b, N, D) to (b, M, D): what each token is given by the windows that hold it."""
    starts, columns, order = _transposed_pattern(taps, heads_at_once(taps))
    values = weights.flatten(1).index_select(1, order).flatten()
    matrix = _matrix(values, starts, columns, len(weights), taps.places, taps.tokens)
    return (matrix @ rows.flatten(0, 1)).view(len(weights), taps.places, -1)


def products(q: Tensor, k: Tensor, scale: float, taps: Taps) -> Tensor:
    """(b, N, D) and (b, M, D) to (b, N, P)."""
    zeros = q.new_zeros(len(q) * taps.tokens * taps.size)
    matrix = _matrix(zeros, *_pattern(taps, heads_at_once(taps)), len(q), taps.tokens, k.shape[1])
    made = torch.sparse.sampled_addmm(matrix, q.flatten(0, 1), k.flatten(0, 1).t(), alpha=scale)
    return made.values().view(len(q), taps.tokens, taps.size)


def _matrix(values: Tensor, starts: Tensor, columns: Tensor, heads: int, height: int, width: int) -> Tensor:
    """The first ``heads`` blocks of a block diagonal."""
    return torch.sparse_csr_tensor(
        starts[: heads * height + 1],
        columns[: values.numel()],
        values,
        (heads * height, heads * width),
        check_invariants=False,
    )


@made_once(16)
def _pattern(taps: Taps, heads: int) -> tuple[Tensor, Tensor]:
    """Starts of the rows and columns of a block diagonal, int32 as MKL takes them."""
    index = taps.index()
    starts = torch.arange(0, heads * index.numel() + 1, taps.size, dtype=torch.int32)
    return starts, (index + taps.places * torch.arange(heads)[:, None, None]).flatten().to(torch.int32)


@made_once(16)
def _transposed_pattern(taps: Taps, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Those of the transposed matrix, and of each of a head's values its place in the weights."""
    index = taps.index().flatten()
    order = index.argsort(stable=True)
    starts = index.bincount(minlength=taps.places).cumsum(0)
    starts = (starts + index.numel() * torch.arange(heads)[:, None]).flatten()
    columns = order // taps.size + taps.tokens * torch.arange(heads)[:, None]
    starts = torch.cat([starts.new_zeros(1), starts])
    return starts.to(torch.int32), columns.flatten().to(torch.int32), order.to(torch.int32)
