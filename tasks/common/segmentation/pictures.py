"""Pictures of a segmented volume: slices with the outlines of reference and prediction, as a radiologist reads them.

Slices are shown in radiological convention (the patient's right on the left of the picture, anterior and superior up)
whatever the order of the file's axes, with every voxel as large as it is. Figures are made without pyplot. Outlines run
along the voxels' edges: the reference solid and orange, the prediction dashed and blue, told apart with any colour
vision and in print.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import nibabel
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from nibabel.orientations import aff2axcodes
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import find_objects, label

from kernels.errors import InputError, unknown_name
from tasks.common.contours import Contour
from tasks.common.mask_outlines import mask_contours

Plane = Literal["axial", "coronal", "sagittal"]
REFERENCE, PREDICTION = "#E69F00", "#56B4E9"
_OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))
# Of a volume whose axes run left, posterior and inferior: the axis a plane cuts, and those that run right and down.
_PLANES: dict[Plane, tuple[int, int, int]] = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}
_OUTLINES: tuple[tuple[str, str, Any], ...] = (
    ("Reference", REFERENCE, "solid"),
    ("Prediction", PREDICTION, (0, (2.4, 1.2))),
)
_SHADE = withStroke(linewidth=1.6, foreground="black")  # white letters on bright fat
_TEXT: dict[str, Any] = {"color": "white", "fontsize": 8, "fontweight": "bold", "path_effects": [_SHADE]}
_WINDOW = (0.5, 99.5)
_SAMPLES = 2_000_000  # voxels looked at for the window of intensities


@dataclass(frozen=True)
class _View:
    """A volume whose axes run left, posterior and inferior, so that any slice is drawn right and down."""

    image: NDArray
    reference: NDArray[np.bool_] | None
    prediction: NDArray[np.bool_] | None
    affine: NDArray[np.float64]
    window: tuple[float, float]

    @property
    def spacing(self) -> NDArray[np.float64]:
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))


def volume_figure(
    image: NDArray,
    affine: ArrayLike,
    reference: NDArray | None = None,
    prediction: NDArray | None = None,
    *,
    title: str = "",
    window: tuple[float, float] | None = None,
) -> Figure:
    """Axial, coronal and sagittal slice through the largest tumour.

    The tumour is the largest piece of the reference, or of the prediction where the reference is empty or not given;
    each slice is the one that shows most of it. Without any, slices run through the middle.

    Args:
        image: (X, Y, Z) intensities.
        affine: (4, 4) voxel to millimetres, RAS+.
        reference, prediction: (X, Y, Z), structure where not 0; None when there is none.
        window: intensities shown black and white; by default the 0.5 and 99.5 percentile of what is not 0.

    Raises:
        InputError: shapes that differ or are not three-dimensional.
    """
    view = _lay_out(image, affine, reference, prediction, window)
    at = _centre(view)
    widths = [view.image.shape[h] * view.spacing[h] for _, h, _ in _PLANES.values()]
    heights = [view.image.shape[v] * view.spacing[v] for _, _, v in _PLANES.values()]
    size = 9.6 / sum(widths)
    figure = Figure(figsize=(9.6, max(heights) * size + (0.75 if title else 0.45)), facecolor="black")
    figure.subplots_adjust(0.004, _legend_share(figure), 0.996, _title_share(figure, title), 0.01, 0)
    for axes, plane in zip(figure.subplots(1, 3, width_ratios=widths), _PLANES, strict=True):
        _draw_slice(axes, view, plane, at[_PLANES[plane][0]])
        axes.set_anchor("C")
    _finish(figure, view, title)
    return figure


def volume_montage(
    image: NDArray,
    affine: ArrayLike,
    reference: NDArray | None = None,
    prediction: NDArray | None = None,
    *,
    plane: Plane = "axial",
    count: int = 8,
    columns: int = 4,
    title: str = "",
    window: tuple[float, float] | None = None,
) -> Figure:
    """Slices of one plane, evenly spread over what is segmented, or over the volume where nothing is.

    Args:
        plane: ``axial``, ``coronal`` or ``sagittal``.
        count: slices at most; each slice is shown once.
        columns: slices side by side.

    The others are those of :func:`volume_figure`.

    Raises:
        InputError: shapes that differ or are not three-dimensional, an unknown plane, or no slices asked for.
    """
    if plane not in _PLANES:
        raise unknown_name("plane", plane, _PLANES)
    if count < 1 or columns < 1:
        raise InputError(f"a montage of {count} slices in {columns} columns cannot be drawn; both must be 1 or more.")
    view = _lay_out(image, affine, reference, prediction, window)
    cut, right, down = _PLANES[plane]
    slices = _spread(view, cut, count)
    columns = min(columns, len(slices))
    rows = -(-len(slices) // columns)
    sides = np.asarray(view.image.shape) * view.spacing
    width = 9.6 / columns
    height = width * sides[down] / sides[right]
    figure = Figure(figsize=(9.6, rows * height + (0.75 if title else 0.45)), facecolor="black")
    figure.subplots_adjust(0.004, _legend_share(figure), 0.996, _title_share(figure, title), 0.02, 0.02)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, index in zip(grid, slices, strict=False):
        _draw_slice(axes, view, plane, index)
    for axes in grid[len(slices) :]:
        axes.remove()
    _finish(figure, view, title)
    return figure


def intensity_window(image: NDArray) -> tuple[float, float]:
    """Black and white level: the 0.5 and 99.5 percentile of the finite voxels that are not 0."""
    step = max(1, round((image.size / _SAMPLES) ** (1 / image.ndim)))
    values = np.asarray(image[(slice(None, None, step),) * image.ndim], np.float32)
    values = values[np.isfinite(values) & (values != 0)]
    if not values.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, _WINDOW))
    return (low, high) if high > low else (low, low + 1)


def _lay_out(
    image: NDArray,
    affine: ArrayLike,
    reference: NDArray | None,
    prediction: NDArray | None,
    window: tuple[float, float] | None,
) -> _View:
    image, affine = np.asarray(image), np.asarray(affine, np.float64)
    if image.ndim != 3 or 0 in image.shape:
        raise InputError(f"a volume of shape {image.shape} cannot be drawn; give one of three axes, (X, Y, Z).")
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or np.linalg.matrix_rank(affine) < 4:
        raise InputError(
            "the affine of a volume to be drawn must be an invertible 4 x 4 matrix of voxel to millimetres."
        )
    masks = {"reference": reference, "prediction": prediction}
    for name, mask in masks.items():
        if mask is not None and np.shape(mask) != image.shape:
            raise InputError(
                f"the {name} has shape {np.shape(mask)} and its image {image.shape}; give both on one grid."
            )
    to_view = nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(affine), nibabel.orientations.axcodes2ornt(("L", "P", "I"))
    )
    turned = {
        name: None if mask is None else nibabel.apply_orientation(np.asarray(mask) != 0, to_view).astype(bool)
        for name, mask in masks.items()
    }
    return _View(
        image=nibabel.apply_orientation(image, to_view),
        affine=affine @ nibabel.orientations.inv_ornt_aff(to_view, image.shape),
        window=intensity_window(image) if window is None else window,
        **turned,
    )


def _centre(view: _View) -> tuple[int, int, int]:
    """The slice along each axis that shows most of the largest piece, or the middle."""
    for mask in (view.reference, view.prediction):
        if mask is None or not mask.any():
            continue
        box = find_objects(mask.astype(np.uint8))[0]
        pieces, _ = label(mask[box])
        largest = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
        found = []
        for axis in range(3):
            areas = largest.sum(axis=tuple(a for a in range(3) if a != axis))
            fullest = np.flatnonzero(areas == areas.max())  # the middle one of equals
            found.append(box[axis].start + int(fullest[len(fullest) // 2]))
        return found[0], found[1], found[2]
    x, y, z = (n // 2 for n in view.image.shape)
    return x, y, z


def _spread(view: _View, axis: int, count: int) -> list[int]:
    """At most ``count`` slices across what is segmented."""
    other = tuple(a for a in range(3) if a != axis)
    shown = np.zeros(view.image.shape[axis], bool)
    for mask in (view.reference, view.prediction):
        if mask is not None:
            shown |= mask.any(axis=other)
    where = np.flatnonzero(shown)
    if len(where):
        low, high = int(where[0]), int(where[-1])
        return sorted({round(v) for v in np.linspace(low, high, count)})
    size = view.image.shape[axis]
    return sorted({int(v) for v in (np.arange(count) + 0.5) * size / count})


def _draw_slice(axes: Axes, view: _View, plane: Plane, index: int) -> None:
    cut, right, down = _PLANES[plane]
    pixels = _slice(view.image, cut, index)
    width, height = float(view.spacing[right]), float(view.spacing[down])
    extent = (0.0, pixels.shape[1] * width, pixels.shape[0] * height, 0.0)
    low, high = view.window
    axes.imshow(pixels, "gray", vmin=low, vmax=high, extent=extent, interpolation="bilinear", aspect="equal")
    for mask, (_, colour, line) in zip((view.reference, view.prediction), _OUTLINES, strict=True):
        if mask is not None:
            _draw_outlines(axes, mask_contours(_slice(mask, cut, index), (width, height)), colour, line)
    axes.set_axis_off()
    codes = aff2axcodes(view.affine)
    letters = {
        "left": _OPPOSITE[codes[right]],
        "right": codes[right],
        "top": _OPPOSITE[codes[down]],
        "bottom": codes[down],
    }
    for side, (x, y) in {"left": (0.02, 0.5), "right": (0.98, 0.5), "top": (0.5, 0.98), "bottom": (0.5, 0.02)}.items():
        beside = side in ("left", "right")
        alignment: dict[str, Any] = {"ha": side, "va": "center"} if beside else {"ha": "center", "va": side}
        axes.text(x, y, letters[side], transform=axes.transAxes, **alignment, **_TEXT)
    where = _position(view, cut, index)
    axes.text(0.02, 0.02, where, ha="left", va="bottom", transform=axes.transAxes, **_TEXT)


def _slice(volume: NDArray, axis: int, index: int) -> NDArray:
    """Rows down, columns to the right."""
    return np.take(volume, index, axis).T


def _position(view: _View, axis: int, index: int) -> str:
    """Where the middle of a slice lies along its normal, as scanners print it: ``S 12 mm``."""
    middle = (np.asarray(view.image.shape) - 1) / 2
    middle[axis] = index
    world = float((view.affine @ np.append(middle, 1))[axis])
    return f"{('RL', 'AP', 'SI')[axis][world < 0]} {abs(world):.0f} mm"


def _draw_outlines(axes: Axes, contours: Sequence[Contour], colour: str, line: Any) -> None:
    paths = [Path(np.concatenate([ring, ring[:1]]), closed=True) for c in contours for ring in (c.outline, *c.holes)]
    if paths:
        whole = Path.make_compound_path(*paths)
        axes.add_patch(PathPatch(whole, fill=False, edgecolor=colour, linestyle=line, linewidth=1.6))


def _finish(figure: Figure, view: _View, title: str) -> None:
    """The legend with volumes, and the title."""
    voxel = abs(float(np.linalg.det(view.affine[:3, :3]))) / 1000
    lines = []
    for mask, (name, colour, style) in zip((view.reference, view.prediction), _OUTLINES, strict=True):
        if mask is not None:
            text = f"{name} {int(mask.sum()) * voxel:.2f} ml"
            lines.append(Line2D([], [], color=colour, linestyle=style, linewidth=1.8, label=text))
    if lines:
        figure.legend(
            handles=lines, loc="lower center", ncols=2, frameon=False, labelcolor="white", fontsize=9, borderpad=0.2
        )
    if title:
        figure.suptitle(title, color="white", fontsize=10, y=1 - 0.06 / figure.get_figheight(), va="top")


def _legend_share(figure: Figure) -> float:
    return 0.40 / figure.get_figheight()


def _title_share(figure: Figure, title: str) -> float:
    return 1 - (0.33 if title else 0.04) / figure.get_figheight()
