"""What every network for volumes has in common: the sizes it takes, and logits at one level or at all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.errors import InputError

DEFAULT_SIZE = (128, 128, 144)
"""Voxels of the volumes that the published networks were trained on; tables of mixers are built for it."""


class VolumeNetwork(nn.Module):
    """Base of the networks: volumes (B, C, D, H, W) to logits (B, K, D, H, W), class 0 being the background.

    A subclass implements :meth:`levels` for sizes that are multiples of ``multiple``. Others are padded at the end of
    each axis, by repeating its last plane, and the logits are cropped back, so that any size from ``smallest`` works.

    Args:
        name: what the network is called in messages.
        in_channels: channels C.
        classes: K, background included.
        multiple: of one axis or of each, what its size has to be divisible by inside.
        smallest: of one axis or of each, the fewest voxels it may have; ``multiple`` when left out.

    Raises:
        InputError: a number of channels or classes is not possible.
    """

    def __init__(
        self,
        name: str,
        in_channels: int,
        classes: int,
        multiple: int | Sequence[int],
        smallest: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if in_channels < 1 or classes < 2:
            raise InputError(
                f"network '{name}': in_channels={in_channels} must be at least 1 and classes={classes} at least 2, "
                "the background and one structure."
            )
        self.name = name
        self.in_channels = in_channels
        self.classes = classes
        self.multiple = _triple(multiple)
        self.smallest = self.multiple if smallest is None else _triple(smallest)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, D, H, W) of volumes (B, C, D, H, W).

        Raises:
            InputError: the volume has another number of axes or channels, or an axis is too small.
        """
        return self._cropped_levels(x, finest_only=True)[0]

    def forward_levels(self, x: Tensor) -> list[Tensor]:
        """Logits at every level that is trained, finest first; the first is what :meth:`forward` gives.

        A level whose voxels are s times as long has ceil(size / s) of them along an axis.

        Raises:
            InputError: as :meth:`forward`.
        """
        return self._cropped_levels(x, finest_only=False)

    def levels(self, x: Tensor, finest_only: bool) -> list[Tensor]:
        """Logits for sizes that are multiples, finest first; the finest alone where that is all that is wanted."""
        raise NotImplementedError

    def check_size(self, size: Sequence[int]) -> None:
        """Refuse sizes (D, H, W) that are too small.

        Raises:
            InputError: naming the axis, its size and the smallest that works.
        """
        if len(size) != 3:
            raise InputError(f"network '{self.name}': the size {tuple(size)} must have three axes.")
        for axis, (side, least) in enumerate(zip(size, self.smallest, strict=True)):
            if side < least:
                raise InputError(
                    f"network '{self.name}': axis {axis} of the volume has {side} voxels and this network halves its "
                    f"axes too often for that; the smallest that works is {least}. Resample to smaller voxels, or "
                    "give the network fewer levels."
                )
        if all(side <= multiple for side, multiple in zip(size, self.multiple, strict=True)) and max(self.multiple) > 1:
            raise InputError(
                f"network '{self.name}': a volume of {'x'.join(map(str, size))} voxels becomes a single voxel at the "
                f"coarsest level; at least one axis must be longer than {max(self.multiple)}."
            )

    def _cropped_levels(self, x: Tensor, finest_only: bool) -> list[Tensor]:
        if x.dim() != 5 or x.shape[1] != self.in_channels:
            raise InputError(
                f"network '{self.name}' takes volumes (B, {self.in_channels}, D, H, W); got {tuple(x.shape)}."
            )
        size = x.shape[2:]
        self.check_size(size)
        padded = pad_to_multiple(x, self.multiple)
        levels = self.levels(padded, finest_only)
        return levels if padded is x else [crop_level(level, size, padded.shape[2:]) for level in levels]


def pad_to_multiple(x: Tensor, multiple: Sequence[int]) -> Tensor:
    """``x`` (B, C, D, H, W) with the last plane of each axis repeated up to a multiple, or ``x`` itself."""
    missing = [-side % step for side, step in zip(x.shape[2:], multiple, strict=True)]
    if not any(missing):
        return x
    ends = [amount for after in reversed(missing) for amount in (0, after)]
    if x.shape[0] == 0:
        return F.pad(x, ends)
    return F.pad(x, ends, mode="replicate")


def crop_level(level: Tensor, size: Sequence[int], padded: Sequence[int]) -> Tensor:
    """The part of a level's logits that covers ``size`` voxels of the ``padded`` volume it was computed for."""
    for axis, (side, whole) in enumerate(zip(size, padded, strict=True), start=2):
        stride = whole // level.shape[axis]
        level = level.narrow(axis, 0, -(-side // stride))
    return level


def _triple(value: int | Sequence[int]) -> tuple[int, int, int]:
    first, second, third = (value,) * 3 if isinstance(value, int) else value
    return first, second, third
