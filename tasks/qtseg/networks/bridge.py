"""QTSeg's bridge: every level of the decoder is given something of every level of the encoder.

Source: Tran et al., QTSeg, arXiv 2412.17241 (multi-level feature distribution, in older checkpoints "MLFF").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbones.cross_stage import ConvUnit, UpConvUnit


class FeatureDistribution(nn.Module):
    """Maps of strides 8, 16 and 32 to maps of the same sizes and widths, each a concatenation of parts of all three.

    Args:
        width: the n of the paper; the maps have 4n, 8n and 16n channels.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        n = width
        # One row for each map that comes out, one entry for each that goes in, finest first.
        self.paths = nn.ModuleList(
            [
                nn.ModuleList([ConvUnit(4 * n, 2 * n), UpConvUnit(8 * n, n, 2), UpConvUnit(16 * n, n, 4)]),
                nn.ModuleList([ConvUnit(4 * n, 2 * n, 3, 2), ConvUnit(8 * n, 4 * n), UpConvUnit(16 * n, 2 * n, 2)]),
                nn.ModuleList([ConvUnit(4 * n, 4 * n, 3, 4, 1), ConvUnit(8 * n, 4 * n, 3, 2), ConvUnit(16 * n, 8 * n)]),
            ]
        )

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """(B, 4n, H, W), (B, 8n, ceil(H/2), ceil(W/2)), (B, 16n, ceil(H/4), ceil(W/4)), and the same out."""
        found = []
        for row, own in zip(self.paths, levels, strict=True):
            paths: Any = row
            parts = [path(x)[..., : own.shape[2], : own.shape[3]] for path, x in zip(paths, levels, strict=True)]
            found.append(torch.cat(parts, 1))
        return found
