"""How far apart the neighbours lie that each block of DiNAT sees, for the sizes of image it was published for.

Weights do not depend on dilations, and the authors change them with the task: the dilated window of a stage, 7 times
its dilation, is to fill the stage's map. In every stage blocks alternate between dilation 1 and larger ones:

| preset | images | stage 1 | stage 2 | stage 3 | stage 4 | kernel |
|---|---|---|---|---|---|---|
| imagenet_224 | classification, 224 | 8 | 4 | 2 | 1 | 7 |
| imagenet_384 | classification, 384 | 13 | 6 | 3 | 1 | 7 |
| coco | detection, 800 x 1333 | 28 | 7, 14 | 3, 5, 7 | 3 | 7 |
| ade20k_512 | segmentation, 512 | 16 | 4, 8 | 2, 3, 4 | 2 | 7 |
| ade20k_640 | segmentation, 640 | 20 | 5, 10 | 2, 3, 4, 5 | 2 | 7 |
| mask2former | segmentation by queries, 640 and more | 14 | 4, 7 | 2, 3 | 1 | 11 |

Several larger ones follow each other and begin again; the last block that has one has the largest. With a kernel of 11
classification at 384 keeps ``imagenet_224``.

Source: the settings published with Hassani and Shi, Dilated Neighborhood Attention Transformer, 2022, arXiv:2209.15001.
"""

from __future__ import annotations

from collections.abc import Sequence

from kernels.errors import InputError, unknown_name

Dilations = str | Sequence[int | Sequence[int]]

PRESETS: dict[str, tuple[tuple[int, ...], ...]] = {
    "imagenet_224": ((8,), (4,), (2,), (1,)),
    "imagenet_384": ((13,), (6,), (3,), (1,)),
    "coco": ((28,), (7, 14), (3, 5, 7), (3,)),
    "ade20k_512": ((16,), (4, 8), (2, 3, 4), (2,)),
    "ade20k_640": ((20,), (5, 10), (2, 3, 4, 5), (2,)),
    "mask2former": ((14,), (4, 7), (2, 3), (1,)),
}


def dilations_of_blocks(dilations: Dilations | None, depths: Sequence[int]) -> list[list[int]]:
    """The dilation of every block of stages that are ``depths`` deep.

    Args:
        dilations: the name of a preset; or for each stage one number, or numbers that its blocks take in turn; None for
            1 everywhere.

    Raises:
        InputError: no such preset, or not one positive entry per stage.

    >>> dilations_of_blocks("ade20k_512", (3, 4, 6, 5))
    [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]]
    """
    if dilations is None:
        return [[1] * depth for depth in depths]
    if isinstance(dilations, str):
        if dilations not in PRESETS:
            raise unknown_name("dilations", dilations, PRESETS)
        if len(depths) != len(PRESETS[dilations]):
            raise InputError(f"dilations={dilations} is for 4 stages, and there are {len(depths)}; give numbers.")
        return [_alternating(larger, depth) for larger, depth in zip(PRESETS[dilations], depths, strict=True)]
    cycles = [(entry,) if isinstance(entry, int) else tuple(entry) for entry in dilations]
    if len(cycles) != len(depths) or not all(cycle and min(cycle) >= 1 for cycle in cycles):
        raise InputError(
            f"dilations={list(dilations)} must have a positive number, or a list of them, for each of the "
            f"{len(depths)} stages, or be one of {', '.join(PRESETS)}."
        )
    return [[cycle[i % len(cycle)] for i in range(depth)] for cycle, depth in zip(cycles, depths, strict=True)]


def _alternating(larger: Sequence[int], depth: int) -> list[int]:
    """1 in blocks 0, 2, ..., and ``larger`` in turn in blocks 1, 3, ..., the largest in the last of these."""
    count = depth // 2
    odd = [max(larger) if i == count - 1 else larger[i % len(larger)] for i in range(count)]
    return [odd[i // 2] if i % 2 else 1 for i in range(depth)]
