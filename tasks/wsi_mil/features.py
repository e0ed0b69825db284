"""Bags of features on disk: the one format that is written, and finding, reading and checking of all that are read.

A bag is one HDF5 file per slide, as TRIDENT and CLAM write it: ``features (N, D)`` float32 or float16 and ``coords
(N, 2)`` int64, level-0 pixels x, y of each tile's top-left corner, with what is known about the tiles as attributes of
``coords`` and of the file. Other layouts are read in ``layouts``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kernels.errors import InputError
from tasks.common.files import atomic_path, safe_id
from tasks.wsi_mil import layouts
from tasks.wsi_mil.layouts import BagInfo

__all__ = [
    "BagInfo",
    "TileCoords",
    "check_bag",
    "find_bags",
    "read_attributes",
    "read_coords",
    "read_features",
    "read_label",
    "write_bag",
]

FORMAT = "fovea-bag-1"
_CHUNK_BYTES = 1 << 20


@dataclass
class TileCoords:
    """Where the tiles of a bag are.

    Attributes:
        xy: (N, 2) int64 top-left corners, level-0 pixels, x then y.
        size: side of a tile, level-0 pixels.
        attrs: what the file says about the tiles, by name.
    """

    xy: np.ndarray
    size: int
    attrs: dict[str, Any] = field(default_factory=dict)


def find_bags(source: str | Path) -> dict[str, BagInfo]:
    """Every bag of a folder (searched with its sub-folders) or file, by slide id, sorted; only shapes are read.

    Ids are file names without suffix, as strings: ``007`` stays ``007``. Where the same slide is there as HDF5 and as
    ``.pt`` or ``.npy`` of the same size (CLAM writes both), the HDF5 file with its coordinates is taken.

    Raises:
        InputError: nothing is there, a file is damaged, an id is unsafe, or two files have the same id.
    """
    source = Path(source)
    if not source.exists():
        raise InputError(
            f"data.features={source} does not exist; give a folder of feature files (action=prepare makes one)."
        )
    found: dict[str, BagInfo] = {}
    for path in sorted(layouts.feature_files(source)):
        for info in layouts.bags_in(path):
            safe_id(info.slide_id, str(info.path))
            other = found.get(info.slide_id)
            if other is None or _prefer(info, other):
                found[info.slide_id] = info
            elif not _prefer(other, info):
                raise InputError(
                    f"slide '{info.slide_id}' has two feature files, {other.path} and {info.path}; keep one, or give "
                    "the "
                    "folder of one encoder with data.features."
                )
    if not found:
        raise InputError(
            f"data.features={source} holds no features; expected .h5, .pt or .npy files (action=prepare makes them)."
        )
    return dict(sorted(found.items()))


def _prefer(one: BagInfo, other: BagInfo) -> bool:
    """Whether ``one`` is the same bag as ``other`` in a richer file."""
    same = (one.num_tiles, one.dim) == (other.num_tiles, other.dim)
    return same and one.path.suffix in layouts.HDF5_SUFFIXES and other.path.suffix not in layouts.HDF5_SUFFIXES


def read_features(info: BagInfo, dtype: str = "float32") -> np.ndarray:
    """Features of a bag, (N, D).

    Raises:
        InputError: the file has gone or is damaged.
    """
    return layouts.read_features(info, dtype)


def read_coords(info: BagInfo, mpp: float | None = None) -> TileCoords | None:
    """Positions of a bag's tiles, or None where the file has none.

    Args:
        mpp: micrometres per level-0 pixel of the slide; needed for files that count in micrometres (STAMP).

    Raises:
        InputError: the file is damaged, or counts in micrometres and ``mpp`` is not given.
    """
    content = layouts.read_coords(info)
    if content is None:
        return None
    xy, attributes = content
    size = layouts.tile_size(xy, attributes)
    if attributes.get("unit") == "um":
        known = mpp or attributes.get("level0_mpp")
        if known is None:
            raise InputError(
                f"{info.path}: tile positions are in micrometres; the slide is needed to place them (its mpp is not "
                "in the file)."
            )
        return TileCoords(np.round(xy / known).astype(np.int64), max(1, round(size / known)), attributes)
    return TileCoords(np.round(xy).astype(np.int64), max(1, round(size)), attributes)


def read_attributes(info: BagInfo) -> dict[str, Any]:
    """What a bag's file says about itself, by name (encoder, weights, mpp, tile size); empty where it says nothing."""
    return layouts.read_attributes(info)


def read_label(info: BagInfo) -> str | None:
    """The label stored with the features (ACMIL's files), or None."""
    label = layouts.read_attributes(info).get("label")
    return None if label is None else str(label)


def check_bag(info: BagInfo) -> None:
    """Read a bag once, part by part, and refuse what cannot be learnt from.

    Raises:
        InputError: there are no tiles, a value is NaN or infinite, or coords and features have different lengths.
    """
    if info.num_tiles == 0 or info.dim == 0:
        raise InputError(
            f"{info.path}: slide '{info.slide_id}' has no tiles ({info.num_tiles} x {info.dim}); remove the file or "
            "prepare the slide again."
        )
    count = layouts.count_coords(info)
    if count is not None and count != info.num_tiles:
        raise InputError(
            f"{info.path}: slide '{info.slide_id}' has {info.num_tiles} features but {count} coords; prepare the "
            "slide again."
        )
    start = 0
    for part in layouts.feature_parts(info):
        bad = ~np.isfinite(part)
        if bad.any():
            row = start + int(np.flatnonzero(bad.any(axis=1))[0])
            raise InputError(
                f"{info.path}: features of slide '{info.slide_id}' hold NaN or infinite values, {int(bad.sum())} of "
                "them from "
                f"tile {row} on; prepare the slide again."
            )
        start += len(part)


def write_bag(
    path: str | Path,
    features: np.ndarray | Iterable[np.ndarray],
    coords: np.ndarray,
    *,
    attributes: Mapping[str, Any] | None = None,
    float16: bool = False,
    dim: int | None = None,
) -> None:
    """Write a bag, whole or not at all.

    Args:
        path: ``.../SLIDE_ID.h5``.
        features: (N, D), or parts of it in order (then ``dim`` = D).
        coords: (N, 2) level-0 pixels, x then y.
        attributes: of the tiles; see ``tile_attributes``. None values are left out, dictionaries are stored as JSON.
        float16: store half the bytes; features above 65504 are refused.

    Raises:
        InputError: the values are not finite, lengths differ, or the file cannot be written.
    """
    path = Path(path)
    coords = np.ascontiguousarray(coords, np.int64).reshape(-1, 2)
    parts: Iterator[np.ndarray] = iter([features] if isinstance(features, np.ndarray) else features)
    dim = features.shape[1] if isinstance(features, np.ndarray) else dim
    assert dim is not None, "features in parts need dim"
    dtype = np.float16 if float16 else np.float32
    count, rows = len(coords), max(1, _CHUNK_BYTES // (max(1, dim) * np.dtype(dtype).itemsize))
    with atomic_path(path) as temporary, h5py.File(temporary, "w", libver=("earliest", "v110")) as file:
        # The checksum of each chunk lets a damaged file say so instead of giving wrong numbers.
        data = file.create_dataset(
            "features", (count, dim), dtype, chunks=(min(rows, max(1, count)), max(1, dim)) if count and dim else None,
            **({"fletcher32": True} if count and dim else {}),
        )  # fmt: skip
        end = 0
        for part in parts:
            data[end : end + len(part)] = _finite(part, dtype, path)
            end += len(part)
        if end != count:
            raise InputError(f"{path}: {end} features for {count} coords; they must be as many.")
        positions = file.create_dataset("coords", data=coords)
        about = {
            "format": FORMAT,
            "num_tiles": count,
            "dim": dim,
            "coords_crc32": zlib.crc32(coords.tobytes()),
            **(attributes or {}),
        }
        for name, value in about.items():
            if value is not None:
                stored = json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
                file.attrs[name] = stored
                positions.attrs[name] = stored
        # Last: a file without it is not finished, whoever wrote it.
        file.attrs["complete"] = True


def _finite(part: np.ndarray, dtype: Any, path: Path) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = part.astype(dtype, copy=False)
    if not np.isfinite(stored).all():
        hint = "; store them with data.float16=false" if np.isfinite(part).all() else ""
        raise InputError(
            f"{path}: the encoder gave features that are NaN or infinite{hint}; check its weights and precision."
        )
    return stored


def last_part(info: BagInfo) -> np.ndarray:
    """The last features of a bag: reading them shows that an HDF5 file is whole without reading all of it.

    Raises:
        InputError: the file is damaged.
    """
    return layouts.read_last(info)
