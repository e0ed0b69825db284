"""What is measured is the same thing, and every row is complete."""

import pytest
import torch
from torch import nn

from attention.dual_position_channel import PositionAttention
from tasks.meningioma import bench_networks


def test_the_released_formulation_computes_the_same() -> None:
    module = PositionAttention(16, form="daunet")
    nn.init.ones_(module.gamma)
    x = torch.randn(2, 16, 3, 4, 2)
    torch.testing.assert_close(bench_networks.released_position(module, x), module(x))


def test_every_row_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_BENCH_QUICK", "1")
    rows = list(bench_networks.rows())
    assert [row.name.partition(",")[0] for row in rows] == [
        *["position attention"] * 4,
        *["agunet of 8 to 64 filters"] * 2,
        "agunet",
    ]
    assert all(row.ours > 0 and row.peer > 0 and (row.peak_mb or 1) > 0 for row in rows)
    assert "19.2 M parameters (ours 18.7 M)" in rows[-1].peer_name
