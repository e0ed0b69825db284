"""Small volumes with a head and a tumour in it, on any grid, and files of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from tasks.common.volumes.geometry import Affine, Grid, as_shape

# Head and tumour in world coordinates, mm: centre, radii.
HEAD, TUMOUR = ((2.0, -3.0, 1.0), (22.0, 26.0, 20.0)), ((8.0, 4.0, 3.0), (7.0, 6.0, 8.0))


def affine_of(axes: str = "RAS", spacing: tuple[float, ...] = (1.0, 1.0, 1.0), tilt: float = 0.0) -> Affine:
    """Array axes that run to ``axes``, turned by ``tilt`` radians about two axes."""
    linear = np.zeros((3, 3))
    for column, (letter, step) in enumerate(zip(axes, spacing, strict=True)):
        row = next(k for k, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        linear[row, column] = step if letter in "RAS" else -step
    c, s = np.cos(tilt), np.sin(tilt)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ linear
    return affine


def centred(affine: Affine, shape: tuple[int, ...]) -> Affine:
    """``affine`` moved so that the middle of the array is the world's origin."""
    found = affine.copy()
    found[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return found


def inside(grid: Grid, ellipsoid: tuple[tuple[float, ...], tuple[float, ...]]) -> NDArray[np.bool_]:
    """Voxels whose centre lies in an ellipsoid of the world."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1)
    world = index @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    centre, radii = ellipsoid
    return (((world - centre) / radii) ** 2).sum(-1) <= 1


def made(grid: Grid, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Intensities (about 400 in the head, 900 in the tumour, noise of 5 outside) and the tumour's mask."""
    rng = np.random.default_rng(seed)
    head, tumour = inside(grid, HEAD), inside(grid, TUMOUR)
    image = rng.uniform(0, 5, grid.shape) + 400 * head + rng.normal(0, 20, grid.shape) * head + 500 * tumour
    return image.astype(np.float32), tumour.astype(np.uint8)


def write_pair(
    folder: Path,
    shape: tuple[int, ...] = (40, 44, 36),
    affine: Affine | None = None,
    seed: int = 0,
    names: tuple[str, str] = ("t1c.nii.gz", "seg.nii.gz"),
    value: int = 1,
) -> tuple[Path, Path]:
    """An image and its label as NIfTI files."""
    grid = Grid(as_shape(shape), centred(affine_of() if affine is None else affine, shape))
    image, mask = made(grid, seed)
    paths = folder / names[0], folder / names[1]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(image, grid.affine), paths[0])
    nib.save(nib.Nifti1Image(mask * np.uint8(value), grid.affine), paths[1])
    return paths


def nifti_variant(kind: str) -> nib.Nifti1Image:
    """Volumes as scanners and programs write them: see the branches."""
    shape, axes, spacing, tilt = (40, 44, 36), "RAS", (1.2, 1.1, 1.5), 0.0
    if kind in ("LAS", "LPS", "PIR"):
        axes = kind
    elif kind == "oblique":
        tilt = 0.3
    elif kind == "thick":
        shape, spacing = (60, 64, 8), (0.8, 0.8, 7.0)
    grid = Grid(as_shape(shape), centred(affine_of(axes, spacing, tilt), shape))
    if kind == "sheared":
        grid.affine[0, 2] += 0.3
    data: NDArray[Any] = made(grid)[0]
    if kind == "slope":
        image = nib.Nifti1Image(np.round(data).astype(np.int16), grid.affine)
        image.header.set_data_dtype(np.int16)
        image.header.set_slope_inter(0.5, -3)
    else:
        image = nib.Nifti1Image(data[..., None] if kind == "4d" else data, grid.affine)
    image.header.set_xyzt_units("mm", "sec")
    codes = {"sform only": (0, 2), "qform only": (1, 0), "neither": (0, 0), "both": (3, 4)}.get(kind, (1, 1))
    image.set_qform(grid.affine, codes[0])
    image.set_sform(grid.affine, codes[1])
    return image


VARIANTS = (
    "LAS",
    "LPS",
    "PIR",
    "oblique",
    "thick",
    "sheared",
    "slope",
    "4d",
    "sform only",
    "qform only",
    "neither",
    "both",
)


def dice(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Overlap of two masks."""
    return 2 * float(np.logical_and(a, b).sum()) / float((a != 0).sum() + (b != 0).sum())
