"""What is said of an attention module beside its code: where it comes from and what it costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """Facts of a registered module, shown by ``python -m attention``.

    Attributes:
        paper: authors, venue or year, arXiv number where there is one.
        complexity: time in the number N of tokens, the channels C left out, as ``O(N)``; other letters are explained in
            the module's docstring.
        operator: the operator of :mod:`kernels` that does the work, ``sdpa`` for PyTorch's fused attention, or empty.
        licence: of the released code; the code here is written from the formulas in any case.
        keeps_matrix: whether the forward pass keeps a matrix of tokens by tokens.
    """

    paper: str
    complexity: str
    operator: str = ""
    licence: str = "none released"
    keeps_matrix: bool = False
