"""Sequences that are a map with other tokens, such as a class token, in front of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kernels.errors import InputError


def grid_behind(name: str, tokens: int, prefix: int, proportions: Sequence[int]) -> tuple[int, int]:
    """Height and width of the map behind ``prefix`` tokens: ``proportions`` themselves, or of the same shape.

    Raises:
        InputError: so many tokens form no such map.
    """
    rest = tokens - prefix
    height, width = proportions
    if rest == height * width:
        return height, width
    height = round(math.sqrt(max(rest, 0) * height / width))
    if rest < 1 or height < 1 or rest % height:
        raise InputError(
            f"attention '{name}': {tokens} tokens with a prefix of {prefix} are no map of the proportions of "
            f"input_size={tuple(proportions)}; give it {prefix} and H x W tokens of that shape."
        )
    return height, rest // height
