"""What a module must compute and move: the parts from which flops and minimum bytes are summed.

A multiply-add counts as two operations. The bytes of a part are those of reading each of its operands and writing its
result once, as if nothing inside it went to memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One step of a module.

    Attributes:
        name: as shown by ``python -m attention show``.
        flops: operations.
        elements: numbers read or written.
    """

    name: str
    flops: float
    elements: float


def projection(name: str, tokens: float, inputs: int, outputs: int) -> Part:
    """A linear layer or 1 x 1 convolution on every token."""
    return Part(name, 2 * tokens * inputs * outputs, tokens * (inputs + outputs) + inputs * outputs)


def attend(name: str, queries: float, keys: float, dim: int, all_keys: float, bias: float = 0) -> Part:
    """Softmax attention of ``queries`` tokens to ``keys`` tokens each, out of ``all_keys`` that are read once.

    ``bias`` counts the numbers that are added to scores.
    """
    return Part(name, 4 * queries * keys * dim, dim * (2 * queries + 2 * all_keys) + bias)


def linear_attention(name: str, tokens: float, dim: int, head_dim: int) -> Part:
    """Keys and values reduced to one matrix per head, queries applied to it."""
    return Part(name, 4 * tokens * dim * head_dim, 4 * tokens * dim)


def depthwise(name: str, tokens: float, dim: int, taps: int) -> Part:
    """A depthwise convolution of ``taps`` taps, or any other weighted sum of as many neighbours."""
    return Part(name, 2 * tokens * dim * taps, 2 * tokens * dim + dim * taps)


def elementwise(name: str, elements: float, tensors: float = 2, flops: float = 1) -> Part:
    """``flops`` operations on each of ``elements`` numbers, ``tensors`` tensors of that size read or written."""
    return Part(name, flops * elements, tensors * elements)
