"""Feature files made elsewhere: CLAM, TRIDENT, STAMP, ACMIL, plain tensors and arrays. Recognised by what is in them.

| layout | file | features | positions |
|---|---|---|---|
| fovea, trident, clam | ``.h5`` | ``features (N, D)`` or ``(1, N, D)`` | ``coords (N, 2)`` level-0 pixels |
| stamp | ``.h5`` | ``feats (N, D)`` | ``coords (N, 2)`` micrometres |
| acmil | one ``.h5`` of groups, one per slide | ``feat (N, D)`` | ``coords (N, 2)``; attribute ``label`` |
| pt | ``.pt`` | a tensor, or a dictionary with ``features``/``feats`` | ``coords`` of the dictionary |
| npy | ``.npy`` | an array | none |
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kernels.errors import InputError

HDF5_SUFFIXES = (".h5", ".hdf5")
_SUFFIXES = (*HDF5_SUFFIXES, ".pt", ".npy")
_FEATURE_NAMES = ("features", "feats", "feat")
_PART_BYTES = 64 << 20


@dataclass(frozen=True)
class BagInfo:
    """One bag: where it is and how large, without its values.

    Attributes:
        slide_id: as a string, leading zeros kept.
        path: the file.
        num_tiles, dim: N and D.
        layout: ``fovea``, ``trident``, ``clam``, ``stamp``, ``acmil``, ``pt`` or ``npy``.
        key: the group inside a file of many bags, else None.
    """

    slide_id: str
    path: Path
    num_tiles: int
    dim: int
    layout: str
    key: str | None = None


def feature_files(source: Path) -> Iterator[Path]:
    """Files under ``source`` that may hold features; hidden ones (being written) are passed over."""
    if source.is_file():
        yield source
        return
    for path in source.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if path.suffix.lower() in _SUFFIXES and not hidden and path.is_file():
            yield path


def bags_in(path: Path) -> Iterator[BagInfo]:
    """The bags of one file; none where the file holds something else (tile positions alone, slide embeddings).

    Raises:
        InputError: the file is damaged or of no known kind.
    """
    suffix = path.suffix.lower()
    if suffix in HDF5_SUFFIXES:
        yield from _hdf5_bags(path)
    elif suffix in _SUFFIXES:
        shape = (_open_tensor(path)[0] if suffix == ".pt" else _open_array(path)).shape
        if len(shape) == 3 and shape[0] == 1:
            shape = shape[1:]
        if len(shape) == 2:
            yield BagInfo(path.stem, path, shape[0], shape[1], suffix[1:])
    else:
        raise InputError(f"{path} is no feature file; expected .h5, .pt or .npy.")


def _hdf5_bags(path: Path) -> Iterator[BagInfo]:
    with _hdf5(path) as file:
        name = next((n for n in _FEATURE_NAMES if isinstance(file.get(n), h5py.Dataset)), None)
        if name is not None:
            shape = file[name].shape
            if len(shape) == 3 and shape[0] == 1:
                shape = shape[1:]
            if len(shape) == 2:
                yield BagInfo(path.stem, path, shape[0], shape[1], _hdf5_layout(file, name))
            return
        for key, group in file.items():
            if isinstance(group, h5py.Group):
                name = next((n for n in _FEATURE_NAMES if isinstance(group.get(n), h5py.Dataset)), None)
                if name is not None and group[name].ndim == 2:
                    count, dim = group[name].shape
                    yield BagInfo(key, path, count, dim, "acmil", key)


def _hdf5_layout(file: h5py.File, name: str) -> str:
    if name == "feats":
        return "stamp"
    if str(file.attrs.get("format", "")).startswith("fovea"):
        return "fovea"
    return "trident" if "coords" in file and "patch_size_level0" in file["coords"].attrs else "clam"


def read_features(info: BagInfo, dtype: str) -> np.ndarray:
    """All features, (N, D), in one read."""
    if info.layout == "pt":
        return _open_tensor(info.path)[0].numpy().reshape(info.num_tiles, info.dim).astype(dtype, copy=False)
    if info.layout == "npy":
        return np.asarray(_open_array(info.path)).reshape(info.num_tiles, info.dim).astype(dtype)
    with _hdf5(info.path) as file:
        data = _features(file, info)
        out = np.empty(data.shape, dtype)
        if data.size:
            data.read_direct(out)
        return out.reshape(info.num_tiles, info.dim)


def feature_parts(info: BagInfo) -> Iterator[np.ndarray]:
    """The features in parts of at most 64 MB, so that a bag of any size can be looked through."""
    rows = max(1, _PART_BYTES // max(1, info.dim * 4))
    if info.layout in ("pt", "npy"):
        values = read_features(info, "float32")
        yield from (values[i : i + rows] for i in range(0, len(values), rows))
        return
    with _hdf5(info.path) as file:
        data = _features(file, info)
        for i in range(0, info.num_tiles, rows):
            yield data[0, i : i + rows] if data.ndim == 3 else data[i : i + rows]


def read_last(info: BagInfo) -> np.ndarray:
    """The last row of features of an HDF5 file, (1, D); its chunk's checksum is verified."""
    with _hdf5(info.path) as file:
        return _features(file, info)[..., -1:, :].reshape(-1, info.dim)


def count_coords(info: BagInfo) -> int | None:
    """How many positions the file has, or None for none at all."""
    if info.path.suffix.lower() not in HDF5_SUFFIXES:
        content = read_coords(info)
        return None if content is None else len(content[0])
    with _hdf5(info.path) as file:
        group = file[info.key] if info.key else file
        return None if "coords" not in group else int(np.prod(group["coords"].shape)) // 2


def read_coords(info: BagInfo) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Positions as stored, (N, 2), and the attributes that explain them."""
    if info.layout == "npy":
        return None
    if info.layout == "pt":
        coords = _open_tensor(info.path)[1]
        return None if coords is None else (coords.numpy().reshape(-1, 2), {})
    with _hdf5(info.path) as file:
        group = file[info.key] if info.key else file
        if "coords" not in group:
            return None
        attributes = _attributes(file) | _attributes(group) | _attributes(group["coords"])
        if info.layout == "stamp":
            attributes.setdefault("unit", "um")
        return group["coords"][()].reshape(-1, 2), attributes


def read_attributes(info: BagInfo) -> dict[str, Any]:
    """Attributes of the file, the features and the positions, merged in this order."""
    if info.path.suffix.lower() not in HDF5_SUFFIXES:
        return {}
    with _hdf5(info.path) as file:
        group = file[info.key] if info.key else file
        merged = _attributes(file) | _attributes(group) | _attributes(_features(file, info))
        return merged | (_attributes(group["coords"]) if "coords" in group else {})


def tile_size(xy: np.ndarray, attributes: dict[str, Any]) -> float:
    """Side of a tile in the positions' unit: from the attributes, else the smallest distance between two tiles."""
    if "patch_size_level0" in attributes:
        return float(attributes["patch_size_level0"])
    if attributes.get("unit") == "um" and "tile_size_um" in attributes:
        return float(attributes["tile_size_um"])
    if "patch_size" in attributes:  # CLAM: pixels at the patch level
        downsample = float(np.ravel(attributes.get("downsample", 1.0))[0])
        return float(attributes["patch_size"]) * downsample * float(attributes.get("custom_downsample", 1.0))
    gaps = np.concatenate([np.diff(np.unique(xy[:, axis])) for axis in (0, 1)]) if len(xy) else np.array([])
    return float(gaps.min()) if len(gaps) else 256.0


def _features(file: h5py.File, info: BagInfo) -> h5py.Dataset:
    group = file[info.key] if info.key else file
    return group[next(n for n in _FEATURE_NAMES if n in group)]


def _attributes(item: h5py.HLObject) -> dict[str, Any]:
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in item.attrs.items()}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


@contextmanager
def _hdf5(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} cannot be read as HDF5 ({reason}); it is damaged or incomplete, prepare the slide again."
        ) from error


def _open_tensor(path: Path) -> tuple[Any, Any]:
    """(features, coords or None) of a ``.pt`` file; mapped from disk, so that asking for the shape reads no values."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises pickle, runtime, zip and OS errors here
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} cannot be read as tensors alone ({reason}); save it again with torch.save(tensor, path)."
        ) from error
    coords = None
    if isinstance(content, dict):
        coords = content.get("coords")
        content = next((content[n] for n in _FEATURE_NAMES if n in content), None)
    if not isinstance(content, torch.Tensor):
        raise InputError(
            f"{path} holds no tensor of features; expected a (tiles, size) tensor or a dictionary with 'features'."
        )
    if content.dtype == torch.bfloat16:  # numpy has none
        content = content.float()
    return content, coords


def _open_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path} cannot be read as a numpy array ({' '.join(str(error).split())}); save it again with np.save."
        ) from error
