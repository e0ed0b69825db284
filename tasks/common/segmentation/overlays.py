"""Segmented 2-D images: outlines of classes, and where reference and prediction differ, drawn on the image.

Pictures are (H, W, 3) uint8 arrays; small images are enlarged so that an outline does not hide what it outlines.
Outlines run along the pixels' edges. Class k has the same colour in every picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray

from kernels.errors import InputError
from tasks.common.mask_outlines import mask_contours
from tasks.common.plots import class_colour
from tasks.common.segmentation.pictures import PREDICTION, REFERENCE, intensity_window

FALSE_POSITIVE, FALSE_NEGATIVE, AGREED = "#D55E00", "#56B4E9", "#F0E442"
Picture = NDArray[np.uint8]
_SHORT_SIDE = 384  # pixels to which small images are enlarged, as near as whole factors come
_LONG_SIDE = 2048  # and no further than this
_SHIFT = 4  # binary digits of a pixel in OpenCV's coordinates
_OUTSIDE = 0.35  # brightness of what lies outside the field of view


def picture_of(image: ArrayLike) -> Picture:
    """An image as (H, W, 3) uint8.

    Args:
        image: (H, W) or (H, W, 1) grey, (H, W, 3) RGB or (H, W, 4) RGBA, whose alpha is dropped. uint8 is taken as it
            is, 0/1 masks become black and white, anything else is shown between its 0.5 and 99.5 percentile.

    Raises:
        InputError: another shape.
    """
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[2] in (1, 4):
        pixels = pixels[..., :1] if pixels.shape[2] == 1 else pixels[..., :3]
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise InputError(f"an image of shape {np.shape(image)} cannot be drawn; give (H, W), (H, W, 3) or (H, W, 4).")
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype != np.uint8:
        low, high = intensity_window(pixels)
        pixels = np.nan_to_num(np.asarray(pixels, np.float32), nan=low, posinf=high, neginf=low)
        pixels = np.clip((pixels - low) * (255 / (high - low)), 0, 255).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def outline_overlay(
    image: ArrayLike,
    labels: ArrayLike,
    *,
    colours: Sequence[str] | None = None,
    enlarge: int | None = None,
    region: ArrayLike | None = None,
) -> Picture:
    """The image with the outline of every class but 0.

    Args:
        image: as in :func:`picture_of`.
        labels: (H, W) class of each pixel, 0 for background.
        colours: of class 1, 2, ...; by default those of all pictures.
        enlarge: whole factor; by default what brings the short side near 384 pixels.
        region: (H, W) field of view; what is outside is darkened.

    Raises:
        InputError: shapes that differ.
    """
    values = _same_shape(image, labels, "labels")
    picture, factor = _canvas(image, region, enlarge)
    for value in np.unique(values[values > 0]).tolist():
        colour = class_colour(value - 1) if colours is None else colours[(value - 1) % len(colours)]
        _draw(picture, values == value, factor, "white", thicker=2)  # dark colours on dark tissue
        _draw(picture, values == value, factor, colour)
    return picture


def comparison_overlay(
    image: ArrayLike,
    reference: ArrayLike,
    prediction: ArrayLike,
    *,
    enlarge: int | None = None,
    region: ArrayLike | None = None,
) -> Picture:
    """The image with the reference orange and the prediction thinner and blue on top, for one structure.

    Args:
        reference, prediction: (H, W), structure where not 0.

    The others are those of :func:`outline_overlay`.
    """
    truth, found = _same_shape(image, reference, "reference"), _same_shape(image, prediction, "prediction")
    picture, factor = _canvas(image, region, enlarge)
    _draw(picture, truth != 0, factor, REFERENCE, thicker=2)
    _draw(picture, found != 0, factor, PREDICTION)
    return picture


def error_overlay(
    image: ArrayLike,
    reference: ArrayLike,
    prediction: ArrayLike,
    *,
    opacity: float = 0.55,
    enlarge: int | None = None,
    region: ArrayLike | None = None,
) -> Picture:
    """The image with agreement yellow, false positives vermilion and misses blue.

    Of several classes, a pixel of a wrong class other than background is both: it is shown as a false positive.

    Args:
        reference, prediction: (H, W) class of each pixel, 0 for background.
        opacity: of the colours, 0 to 1.
        region: (H, W) field of view; what is outside is darkened and not judged.
    """
    truth, found = _same_shape(image, reference, "reference"), _same_shape(image, prediction, "prediction")
    picture, factor = _canvas(image, region, enlarge)
    judged = np.ones(truth.shape, bool) if region is None else np.asarray(region) != 0
    kinds = {
        AGREED: (truth == found) & (truth != 0),
        FALSE_POSITIVE: (found != 0) & (truth != found),
        FALSE_NEGATIVE: (found == 0) & (truth != 0),
    }
    for colour, mask in kinds.items():
        large = _enlarged(mask & judged, factor)
        mixed = (1 - opacity) * picture[large] + opacity * np.array(_rgb(colour))
        picture[large] = mixed.round().astype(np.uint8)
    return picture


def segmentation_figure(
    image: ArrayLike,
    reference: ArrayLike | None,
    prediction: ArrayLike,
    classes: Sequence[str],
    *,
    region: ArrayLike | None = None,
    title: str = "",
) -> Figure:
    """The image, its outlines and its errors side by side with a legend; without a reference, image and outlines.

    One structure is shown with both outlines on one picture; several have a picture for each side.

    Args:
        classes: names with background first; two for one structure.

    Raises:
        InputError: shapes that differ, fewer than two classes, or a class without a name.
    """
    found = _same_shape(image, prediction, "prediction")
    truth = None if reference is None else _same_shape(image, reference, "reference")
    highest = max(int(found.max()), 0 if truth is None else int(truth.max()))
    if len(classes) < 2 or highest >= len(classes):
        needed = max(highest, 1) + 1
        raise InputError(f"labels up to {highest} need {needed} class names, background first; {len(classes)} given.")
    panels: list[tuple[str, Picture]] = [("Image", _canvas(image, region, None)[0])]
    single = len(classes) == 2
    if truth is None:
        colours = [PREDICTION] if single else None
        panels.append(("Prediction", outline_overlay(image, found, colours=colours, region=region)))
    elif single:
        panels.append(("Outlines", comparison_overlay(image, truth, found, region=region)))
    else:
        panels.append(("Reference", outline_overlay(image, truth, region=region)))
        panels.append(("Prediction", outline_overlay(image, found, region=region)))
    if truth is not None:
        panels.append(("Errors", error_overlay(image, truth, found, region=region)))
    height, width = panels[0][1].shape[:2]
    side = 9.6 / len(panels)
    figure = Figure(figsize=(9.6, side * height / width + (1.0 if title else 0.75)), facecolor="white")
    tall = figure.get_figheight()
    figure.subplots_adjust(0.005, 0.42 / tall, 0.995, 1 - (0.52 if title else 0.27) / tall, 0.02, 0)
    for axes, (name, picture) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _show(axes, picture, name)
    handles = _legend(classes, single, truth is not None)
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 6), frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.06 / tall, va="top")
    return figure


def _legend(classes: Sequence[str], single: bool, judged: bool) -> list[Line2D]:
    if single and judged:
        lines = {"Reference": REFERENCE, "Prediction": PREDICTION}
    elif single:
        lines = {str(classes[1]): PREDICTION}
    else:
        lines = {str(name): class_colour(i) for i, name in enumerate(classes[1:])}
    areas = {"Agreed": AGREED, "False positive": FALSE_POSITIVE, "Missed": FALSE_NEGATIVE} if judged else {}
    handles = [Line2D([], [], color=colour, linewidth=2, label=name) for name, colour in lines.items()]
    dots = {"linestyle": "none", "marker": "s", "markersize": 8, "markeredgecolor": "#8a8a8a"}
    return handles + [Line2D([], [], color=colour, label=name, **dots) for name, colour in areas.items()]  # type: ignore[arg-type]


def _show(axes: Axes, picture: Picture, name: str) -> None:
    axes.imshow(picture, interpolation="antialiased")
    axes.set_title(name, fontsize=9)
    axes.set_axis_off()


def _same_shape(image: ArrayLike, labels: ArrayLike, name: str) -> NDArray:
    values, size = np.asarray(labels), np.shape(image)[:2]
    if values.shape != size:
        raise InputError(f"the {name} have the shape {values.shape} and the image {size}; give both at one size.")
    return values.astype(np.uint8) if values.dtype == bool else values


def _canvas(image: ArrayLike, region: ArrayLike | None, enlarge: int | None) -> tuple[Picture, int]:
    """A copy of the image, enlarged and dark outside the field of view, and the factor."""
    picture = picture_of(image)
    height, width = picture.shape[:2]
    if enlarge is None:
        enlarge = max(1, min(round(_SHORT_SIDE / min(height, width)), _LONG_SIDE // max(height, width)))
    if enlarge < 1:
        raise InputError(f"enlarge={enlarge}: pictures are enlarged by a whole factor of 1 or more.")
    size = (width * enlarge, height * enlarge)
    large = picture.copy() if enlarge == 1 else cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
    large = np.asarray(large, np.uint8)
    if region is not None:
        outside = _enlarged(_same_shape(image, region, "region") == 0, enlarge)
        large[outside] = (large[outside] * _OUTSIDE).astype(np.uint8)
    return large, enlarge


def _enlarged(mask: NDArray[np.bool_], factor: int) -> NDArray[np.bool_]:
    return mask.repeat(factor, axis=0).repeat(factor, axis=1)


def _draw(picture: Picture, mask: NDArray, factor: int, colour: str, thicker: int = 0) -> None:
    """Outline ``mask`` on ``picture``, which is ``factor`` times as large."""
    width = max(2, round(min(picture.shape[:2]) / 200)) + thicker
    contours = mask_contours(mask, (factor, factor))
    rings = [ring for c in contours for ring in (c.outline, *c.holes)]
    # The corner of a pixel lies half a pixel before its centre, which is where OpenCV counts from.
    points = [np.round((ring - 0.5) * (1 << _SHIFT)).astype(np.int32) for ring in rings]
    cv2.polylines(picture, points, True, _rgb(colour), width, cv2.LINE_AA, shift=_SHIFT)


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in to_rgb(colour))
    return red, green, blue
