"""Features of a slide that is being worked on: appended batch by batch, so that a killed run goes on where it was.

The file starts with one JSON line that says which slide, settings and tiles it belongs to; after it come records of
float32, in reading order: a state (what became of the tile) and the features. A record cut off by a kill is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tasks.common.files import explain_os_errors

KEPT, REJECTED, WHITE = 0.0, 1.0, 2.0  # WHITE: unreadable in the slide, replaced by a white tile
_PART_ROWS = 4096


class PartialFeatures:
    """The growing file of one slide.

    Args:
        path: the file; continued when its first line is that of ``signature``, else started afresh.
        signature: everything the features depend on; JSON values.
        count, dim: tiles to come and feature size.
        batch: the file is continued at a whole number of batches, so that batches are the same as in an unbroken run.
    """

    def __init__(self, path: Path, signature: dict[str, Any], count: int, dim: int, batch: int) -> None:
        self.path, self.count, self.dim = path, count, dim
        head = {"signature": signature, "count": count, "dim": dim, "batch": batch}
        self._header = (json.dumps(head, sort_keys=True) + "\n").encode()
        self._record = (dim + 1) * 4
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.done = self._rows_on_disk() // batch * batch
            self._file = path.open("r+b" if self.done else "wb", buffering=0)
            if not self.done:
                self._write(self._header)
            self._file.truncate(len(self._header) + self.done * self._record)
            self._file.seek(0, os.SEEK_END)

    def append(self, features: np.ndarray, state: np.ndarray) -> None:
        """Add the next tiles in reading order: features (n, D), state (n,)."""
        records = np.empty((len(features), self.dim + 1), np.float32)
        records[:, 0], records[:, 1:] = state, features
        with explain_os_errors(self.path):
            self._write(records.tobytes())
        self.done += len(features)

    def states(self) -> np.ndarray:
        """What became of each tile, (count,) in reading order."""
        return np.array(self._records()[:, 0])

    def parts(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """Features of the tiles ``order`` (places in the reading order), part by part."""
        records = self._records()
        for i in range(0, len(order), _PART_ROWS):
            yield records[order[i : i + _PART_ROWS], 1:]

    def close(self, remove: bool = False) -> None:
        """Close the file; ``remove`` when its features are safe elsewhere."""
        self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)

    def _records(self) -> np.ndarray:
        if not self.count:
            return np.empty((0, self.dim + 1), np.float32)
        shape = (self.count, self.dim + 1)
        return np.memmap(self.path, np.float32, "r", offset=len(self._header), shape=shape)

    def _write(self, content: bytes) -> None:
        view = memoryview(content)
        while len(view):
            view = view[self._file.write(view) :]

    def _rows_on_disk(self) -> int:
        try:
            with self.path.open("rb") as file:
                if file.read(len(self._header)) != self._header:
                    return 0
                size = os.fstat(file.fileno()).st_size - len(self._header)
        except FileNotFoundError:
            return 0
        whole = size // self._record
        return self.count if whole >= self.count else whole


def digest(*arrays: np.ndarray) -> str:
    """A short fingerprint of arrays."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]
