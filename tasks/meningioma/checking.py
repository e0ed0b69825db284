"""Reading every file of a set once before anything is trained: what each case is like, and everything that is wrong."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kernels.errors import InputError
from tasks.common.files import cache_folder, write_json
from tasks.common.progress import ProgressBars
from tasks.common.volumes.geometry import Grid
from tasks.common.volumes.reading import read_label, read_volume
from tasks.common.volumes.volume import Volume
from tasks.meningioma.cases import Case, size_of

_VERSION = 1  # of Facts
_LARGE = 2**27  # bytes of a file above which cases are read one at a time


@dataclass
class Facts:
    """What one case is like; plain values only.

    Attributes:
        shape, spacing, orientation: of the first channel; mm.
        voxel_ml: volume of its voxels.
        lowest, highest: intensities of the first channel.
        counts: value of the label map -> number of voxels, 0 left out.
        components: connected pieces (by faces, edges or corners) of the foreground.
        problems: sentences; a case that has any cannot be used.
        notes: sentences on what is done about it.
    """

    shape: list[int] = field(default_factory=list)
    spacing: list[float] = field(default_factory=list)
    orientation: str = ""
    voxel_ml: float = 0.0
    lowest: float = 0.0
    highest: float = 0.0
    counts: dict[int, int] = field(default_factory=dict)
    components: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine_cases(cases: Sequence[Case], foreground: Sequence[int] | None) -> list[Facts]:
    """The facts of each case, with a progress bar; those of unchanged files come from the cache.

    Args:
        foreground: the label values whose components are counted; None for all but 0.
    """
    large = any(path.is_file() and size_of(path) > _LARGE for case in cases for path in case.files())
    workers = 1 if large else min(4, os.cpu_count() or 1)
    with ProgressBars() as bars, ThreadPoolExecutor(workers) as pool:
        bar = bars.add("checking volumes", total=len(cases), unit="cases", passing=True)

        def look(case: Case) -> Facts:
            facts = _remembered(case, foreground)
            bar.advance(1)
            return facts

        return list(pool.map(look, cases))


def examine(case: Case, foreground: Sequence[int] | None = None) -> Facts:
    """Read all files of a case completely; no problem keeps the others from being found."""
    facts = Facts()
    first: Grid | None = None
    for number, (path, channel) in enumerate(zip(case.images, case.channels or [None] * len(case.images), strict=True)):
        try:
            image = read_volume(path, channel)
        except InputError as error:
            facts.problems.append(str(error))
            continue
        if number == 0:
            first = image.grid
            facts.shape, facts.spacing = list(first.shape), [round(s, 6) for s in first.spacing]
            facts.orientation, facts.voxel_ml = first.orientation, first.voxel_ml
            facts.lowest, facts.highest = float(image.data.min()), float(image.data.max())
        elif first is not None and not image.grid.same_as(first):
            facts.notes.append(f"{path} lies on another grid than {case.images[0].name}: it is resampled to that.")
        del image
    if case.label is not None:
        try:
            label = read_label(case.label)
        except InputError as error:
            facts.problems.append(str(error))
        else:
            if first is not None and not label.grid.same_as(first):
                facts.problems.append(_mismatch(case, label.grid, first))
            _count(label, foreground, facts)
    return facts


def _count(label: Volume, foreground: Sequence[int] | None, facts: Facts) -> None:
    values = label.data
    found = np.bincount(values.ravel("K")) if values.dtype.itemsize < 4 else None
    if found is None:
        numbers, amounts = np.unique(values, return_counts=True)
        pairs = zip(numbers.tolist(), amounts.tolist(), strict=True)
    else:
        pairs = zip(np.flatnonzero(found).tolist(), found[found > 0].tolist(), strict=True)
    facts.counts = {value: amount for value, amount in pairs if value != 0}
    mask = values != 0 if foreground is None else np.isin(values, list(foreground), kind="table")
    facts.components = count_components(mask)


def count_components(mask: NDArray[np.bool_]) -> int:
    """Connected pieces of ``mask``, neighbours by faces, edges or corners."""
    spots = ndimage.find_objects(mask.view(np.uint8))
    if not spots or spots[0] is None:
        return 0
    return int(ndimage.label(mask[spots[0]], np.ones((3, 3, 3)))[1])


def _mismatch(case: Case, label: Grid, image: Grid) -> str:
    """Both geometries, and what of them differs."""
    where = f"{case.label} does not lie on its image {case.images[0]}"
    if label.shape != image.shape:
        return f"{where}: its shape is {_by(label.shape)}, the image's {_by(image.shape)}; resample the label first."
    off = float(np.abs(label.affine - image.affine).max())
    return (
        f"{where}: its affine differs by up to {off:.4g}: label {_placed(label)}; image {_placed(image)}; "
        "correct the header, or resample the label."
    )


def _placed(grid: Grid) -> str:
    origin = ", ".join(f"{v:.4g}" for v in grid.affine[:3, 3])
    return f"origin ({origin}), spacing {_by([f'{s:.4g}' for s in grid.spacing])} mm, axes {grid.orientation}"


def _by(values: Sequence[Any]) -> str:
    return " x ".join(map(str, values))


def _remembered(case: Case, foreground: Sequence[int] | None) -> Facts:
    """Facts from the cache, or new ones, which are kept when nothing was wrong."""
    try:
        stamps = [stamp_of(path) for path in case.files()]
    except OSError:
        return examine(case, foreground)
    key = json.dumps([_VERSION, stamps, case.channels, None if foreground is None else sorted(foreground)])
    file = cache_folder() / "volume_checks" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    try:
        content = json.loads(file.read_text())
        content["counts"] = {int(value): amount for value, amount in content["counts"].items()}
        return Facts(**content)
    except (OSError, ValueError, KeyError, TypeError):  # not there, or of another version
        facts = examine(case, foreground)
    if not facts.problems:
        try:
            write_json(file, asdict(facts))
        except (InputError, OSError):  # without a cache the next check takes longer, and that is all
            return facts
    return facts


def stamp_of(path: Path) -> list[Any]:
    """What changes when a file does (or its pair, or the slices of a folder): names, sizes, times."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    if path.suffix.lower() in (".hdr", ".img", ".mhd", ".nhdr"):  # the data lie in another file
        files = sorted(path.parent.glob(f"{path.stem}.*"))
    return [str(path.resolve()), [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]]
