"""The benchmark and the matrix of combinations run."""

from __future__ import annotations

import pytest

from tasks.qtseg.bench_networks import combinations, matrix, rows
from tests.qtseg.networks.small import QTSEG


def test_rows_are_rates_beside_both_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_BENCH_QUICK", "1")
    found = list(rows())
    assert [row.peer_name for row in found].count("itself as published") == 3 == len(found) / 2
    assert all(row.ours > 0 and row.peer > 0 for row in found)
    assert found[0].ratio > 1  # operations


def test_the_matrix_names_every_kind_and_says_what_fails() -> None:
    every = combinations()
    assert {"backbone biformer_tiny", "backbone resnet18", "mixer neighborhood", "gate ela"} <= every.keys()
    assert not {"gate query_readout", "mixer abmil"} & every.keys()
    names = ["backbone qtseg_encoder", "backbone conch_v1_5", "mixer window", "gate polarized_parallel"]
    tried = {row.name: row for row in matrix(QTSEG, [name for name in names if name in every], size=(45, 35))}
    assert all(row.ok for row in tried.values()), tried
    assert "gives no feature maps" in tried["backbone conch_v1_5"].said
    (failed,) = matrix(QTSEG, ["backbone resnet18"], size=(20, 20))
    assert not failed.ok and "32 x 32" in failed.said
