"""Fourier positions: the formula, cells' centres, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from attention.fourier_positions import FourierPositions
from kernels.errors import InputError


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (4, 1)], ids=str)
def test_it_is_sines_and_cosines_of_projected_centres(size: tuple[int, int]) -> None:
    module = FourierPositions(6).double()
    found = module(*size)
    rows, columns = (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1 for n in size)
    places = torch.stack([columns.expand(size), rows[:, None].expand(size)], -1)
    angles = 2 * math.pi * places @ module.frequencies
    torch.testing.assert_close(found, torch.cat([angles.sin(), angles.cos()], -1))


def test_an_odd_number_of_features_is_refused() -> None:
    with pytest.raises(InputError, match="dim=5 must be an even number"):
        FourierPositions(5)
