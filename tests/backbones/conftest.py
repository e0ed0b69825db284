"""An empty model hub cache that is offline, and a way to put files into it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Publish = Callable[[str, Path, str], None]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Lays a file into the hub's cache as a download would have: ``publish(hub_id, file, name)``."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def publish(hub_id: str, file: Path, name: str) -> None:
        folder = cache / f"models--{hub_id.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(COMMIT)
        (folder / "snapshots" / COMMIT).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / "snapshots" / COMMIT / name)

    return publish
