"""U-Net: a decoder that doubles the resolution step by step beside the encoder's maps.

Source: Ronneberger, Fischer and Brox, U-Net, MICCAI 2015, arXiv 1505.04597, with zeros around every convolution, so
that maps keep their size, and batch normalisation, as it is used today; with ``width=64`` and its own encoder, 31.04
million parameters for two classes. Any other backbone's maps take the place of the encoder's, and double convolutions
without a map of the encoder go on from its finest map to the image's resolution.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.gate import Gate
from kernels.errors import InputError
from tasks.qtseg.networks.levels import Levels
from tasks.qtseg.networks.units import DoubleConv

STRIDES = (4, 8, 16, 32)
"""Of the maps that are made of those of an encoder that is no pyramid."""


class DoubleConvEncoder(nn.Module):
    """The classic encoder: double convolutions with maximum pooling between them, each twice as wide as the one before.

    Images (B, in_chans, H, W) to maps (B, width * stride, ceil(H / stride), ceil(W / stride)).

    Args:
        in_chans: of the images.
        width: channels at the images' resolution.
        depth: number of maps; their strides are 1, 2, 4, ...

    Raises:
        InputError: a number is not positive.
    """

    def __init__(self, in_chans: int = 3, width: int = 64, depth: int = 5) -> None:
        super().__init__()
        if min(in_chans, width) < 1 or depth < 2:
            raise InputError(
                f"decoder unet: in_chans={in_chans} and width={width} must be at least 1, depth={depth} at least 2."
            )
        self.strides = tuple(2**i for i in range(depth))
        self.channels = tuple(width * stride for stride in self.strides)
        inputs = (in_chans, *self.channels[:-1])
        self.stages = nn.ModuleList(DoubleConv(*sides) for sides in zip(inputs, self.channels, strict=True))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for stage in self.stages:
            # Rounded up, so that images of any size lose nothing at their borders.
            x = stage(F.max_pool2d(x, 2, ceil_mode=True) if maps else x)
            maps.append(x)
        return maps


class UpBlock(nn.Module):
    """Twice the resolution, beside a map of the encoder where there is one: to (B, outputs, H, W).

    Args:
        inputs, skipped, outputs: channels of the coarser features, of the encoder's map (0 for none), and of what
            comes out.
    """

    def __init__(self, inputs: int, skipped: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        self.convs = DoubleConv(outputs + skipped, outputs)

    def forward(self, x: Tensor, size: Sequence[int], skip: Tensor | None = None, gate: Any = None) -> Tensor:
        x = self.up(x)[..., : size[0], : size[1]]
        if skip is None:
            return self.convs(x)
        if gate is not None:
            signalled = isinstance(gate, Gate) and gate.takes_signal
            skip = gate(skip, x) if signalled else gate(skip)
        return self.convs(torch.cat([skip, x], 1))


class UNet(nn.Module):
    """Images (B, C, H, W) to logits (B, K, H, W), for any H, W that the encoder takes.

    Args:
        encoder: gives a list of maps for an image, and has ``channels`` and ``strides``. Maps whose strides are
            ascending powers of two are taken as they are, others are resized to strides 4 to 32.
        num_classes: K, with the background.
        width: channels of the decoder at stride s are ``width * s``.
        gates: see :meth:`gate_dims`; on the encoder's maps, deciding by the decoder's features where they take a
            signal.
        deep_supervision: predict at every resolution of the decoder.

    Raises:
        InputError: a number is not positive.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int = 2,
        width: int = 16,
        gates: Sequence[nn.Module] | None = None,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if min(num_classes, width) < 1:
            raise InputError(f"decoder unet: classes={num_classes} and width={width} must be at least 1.")
        made: Any = encoder
        self.num_classes = num_classes
        self.strides, widths = _levels(made.strides, made.channels, width)
        self.levels = Levels(made.channels, made.strides, self.strides, widths)
        self.gates = None if gates is None else nn.ModuleList(gates)
        blocks, inputs, stride = [], widths[-1], self.strides[-1]
        while stride > 1:
            stride //= 2
            skipped = widths[self.strides.index(stride)] if stride in self.strides else 0
            blocks.append(UpBlock(inputs, skipped, width * stride))
            inputs = width * stride
        self.blocks = nn.ModuleList(blocks)
        # From the finest to the coarsest, as the levels are returned.
        supervised = range(len(blocks)) if deep_supervision else range(1)
        self.heads = nn.ModuleList(nn.Conv2d(width * 2**i, num_classes, 1) for i in supervised)
        self.encoder = encoder

    @staticmethod
    def gate_dims(encoder: nn.Module, width: int) -> list[tuple[int, int]]:
        """Channels of each of the encoder's maps that a gate is put on, finest first, and of its signal."""
        made: Any = encoder
        strides, widths = _levels(made.strides, made.channels, width)
        return [(dim, width * stride) for dim, stride in zip(widths[:-1], strides[:-1], strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) for images (B, C, H, W)."""
        return self.heads[0](self._features(x)[0])

    def forward_levels(self, x: Tensor) -> list[Tensor]:
        """Logits (B, K, ceil(H / s), ceil(W / s)) for s = 1, 2, 4, ...; the first alone without deep supervision."""
        return [head(y) for head, y in zip(self.heads, self._features(x), strict=False)]

    def _features(self, x: Tensor) -> list[Tensor]:
        """The decoder's features, finest first."""
        maps = dict(zip(self.strides, self.levels(self.encoder(x), x.shape[2:]), strict=True))
        stride = self.strides[-1]
        y, found = maps[stride], []
        for block in self.blocks:
            stride //= 2
            skip = maps.get(stride)
            gate = None if self.gates is None or skip is None else self.gates[self.strides.index(stride)]
            y = block(y, [-(-n // stride) for n in x.shape[2:]], skip, gate)
            found.append(y)
        return found[::-1]


def _levels(strides: Sequence[float], channels: Sequence[int], width: int) -> tuple[tuple[int, ...], list[int]]:
    """Strides of the maps a decoder goes through, and their channels."""
    whole = [int(s) for s in strides]
    doubling = all(b == 2 * a for a, b in itertools.pairwise(whole)) and len(whole) > 1
    if doubling and whole == list(strides) and whole[0].bit_count() == 1:
        return tuple(whole), list(channels)
    return STRIDES, [width * s for s in STRIDES]
