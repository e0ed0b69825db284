"""A slide's unfinished features go on where they were cut off, and only for the same slide and settings."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tasks.wsi_mil.partial import KEPT, REJECTED, PartialFeatures, digest

X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)


def opened(path: Path, **changed: object) -> PartialFeatures:
    signature = {"encoder": "a", **{k: v for k, v in changed.items() if k == "encoder"}}
    return PartialFeatures(path, signature, 20, 3, int(changed.get("batch", 4)))  # type: ignore[call-overload]


def fill(partial: PartialFeatures, end: int) -> None:
    for start in range(partial.done, end, 4):
        partial.append(X[start : start + 4], np.full(4, KEPT))


def test_features_come_back_in_any_order(tmp_path: Path) -> None:
    partial = opened(tmp_path / "a.bin")
    fill(partial, 16)
    partial.append(X[16:], np.full(4, REJECTED))
    order = np.random.default_rng(1).permutation(20)
    np.testing.assert_array_equal(np.concatenate(list(partial.parts(order))), X[order])
    assert partial.states().tolist() == [KEPT] * 16 + [REJECTED] * 4
    partial.close(remove=True)
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize("lost", [0, 1, 15, 16, 17, 40])
def test_a_file_cut_anywhere_goes_on_at_a_whole_batch(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "a.bin"
    partial = opened(path)
    fill(partial, 12)
    partial.close()
    path.write_bytes(path.read_bytes()[: path.stat().st_size - lost])
    with closing(opened(path)) as again:
        assert again.done == (12 - -(-lost // 16)) // 4 * 4
        fill(again, 20)
        np.testing.assert_array_equal(np.concatenate(list(again.parts(np.arange(20)))), X)


@pytest.mark.parametrize("changed", [{"encoder": "b"}, {"batch": 5}])
def test_other_settings_start_afresh(tmp_path: Path, changed: dict[str, object]) -> None:
    partial = opened(tmp_path / "a.bin")
    fill(partial, 12)
    partial.close()
    for settings in (changed, {}):
        with closing(opened(tmp_path / "a.bin", **settings)) as afresh:
            assert afresh.done == 0


def test_a_digest_tells_arrays_apart() -> None:
    assert digest(X) == digest(X.copy()) != digest(X[::-1])
