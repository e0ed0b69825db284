"""What the numbers in a mask file mean: two classes, grey levels by name, colours by name, or the hues of NeoPolyp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError
from tasks.common.images import MaskPixels, read_mask

Labels = NDArray[np.uint8]
Kind = Literal["binary", "greys", "colours", "hues"]
_JPEG_THRESHOLD = 127
_SHOWN = 8  # values in a message
# OpenCV's hues are half degrees. Black and the grey fringe that JPEG draws around it have little colour or light.
_RED_BELOW, _RED_ABOVE, _GREEN = 20, 160, (35, 90)
_LEAST_SATURATION, _LEAST_VALUE = 60, 60


@dataclass(frozen=True)
class MaskCoding:
    """How a mask becomes class indices; class 0 is the background.

    Attributes:
        kind: ``binary`` (black and one other value), ``greys``, ``colours`` (values by class), ``hues`` (green is class
            1 and red class 2, or both class 1 where there is only one class, as in BKAI-IGH NeoPolyp).
        classes: names, the background first.
        values: what each class is written as, a number or (red, green, blue); None where ``kind`` says it.
        threshold: greys above it are foreground, for ``binary``; None: two values are expected, and 127 for JPEG.
    """

    kind: Kind = "binary"
    classes: tuple[str, ...] = ("background", "foreground")
    values: tuple[int | tuple[int, int, int], ...] | None = None
    threshold: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings."""
        return asdict(self)

    def decode(self, mask: MaskPixels, path: Path) -> Labels:
        """Class index of every pixel, (H, W) uint8.

        Raises:
            InputError: a value that stands for no class; the message shows the values and how often they occur.
        """
        match self.kind:
            case "binary":
                return self._binary(mask, path)
            case "greys":
                return self._greys(mask, path)
            case "colours":
                return self._colours(mask, path)
        return self._hues(mask, path)

    def _binary(self, mask: MaskPixels, path: Path) -> Labels:
        array = mask.array
        if array.dtype == np.bool_:
            return array.astype(np.uint8)
        threshold = _JPEG_THRESHOLD if mask.lossy and self.threshold is None else self.threshold
        if threshold is not None:
            light = array if array.ndim == 2 else array.max(2)
            return (light > threshold).astype(np.uint8)
        codes = _packed(array) if array.ndim == 3 else array
        if not _is_black_and_one(codes):
            raise InputError(
                f"{path} is not black and one other value ({_counted(codes, array.ndim == 3)}); name the classes with "
                "data.labels={NAME: VALUE, ...}, or set data.threshold."
            )
        return (codes != 0).astype(np.uint8)

    def _greys(self, mask: MaskPixels, path: Path) -> Labels:
        array = mask.array
        if array.ndim == 3:
            raise InputError(
                f"{path} is in colour, but data.labels names grey levels; give colours, such as [255, 0, 0]."
            )
        wanted = np.array(self.values, np.int64)
        if mask.lossy:
            return _nearest(array[..., None].astype(np.float32), wanted[:, None].astype(np.float32))
        return self._exact(array.astype(np.int64), wanted, path, colour=False)

    def _colours(self, mask: MaskPixels, path: Path) -> Labels:
        array = mask.colours if mask.colours is not None else mask.array
        array = np.repeat(array[..., None], 3, 2) if array.ndim == 2 else array
        if array.dtype == np.bool_:
            array = array.astype(np.uint8) * 255
        wanted = np.array(self.values, np.int64)
        if mask.lossy:
            return _nearest(array.astype(np.float32), wanted.astype(np.float32))
        return self._exact(_packed(array), _packed(wanted), path, colour=True)

    def _exact(self, codes: NDArray[np.int64], wanted: NDArray[np.int64], path: Path, colour: bool) -> Labels:
        order = np.argsort(wanted)
        place = np.clip(np.searchsorted(wanted[order], codes), 0, len(wanted) - 1)
        labels = order[place].astype(np.uint8)
        if bool((unknown := wanted[labels] != codes).any()):
            raise InputError(
                f"{path} holds values that data.labels does not name ({_counted(codes[unknown], colour)}); name them "
                "or correct the mask."
            )
        return labels

    def _hues(self, mask: MaskPixels, path: Path) -> Labels:
        array = mask.array
        if array.ndim == 2:
            # These masks are also handed on as class indices; a black JPEG is a mask of nothing.
            if int(array.max()) > (_LEAST_VALUE if mask.lossy else 2):
                raise InputError(f"{path} has no colours; masks of this data set are red and green.")
            classes = np.zeros_like(array) if mask.lossy else array
        else:
            hue, saturation, value = cv2.split(cv2.cvtColor(np.ascontiguousarray(array, np.uint8), cv2.COLOR_RGB2HSV))
            coloured = (saturation >= _LEAST_SATURATION) & (value >= _LEAST_VALUE)
            red = coloured & ((hue < _RED_BELOW) | (hue >= _RED_ABOVE))
            green = coloured & (hue >= _GREEN[0]) & (hue < _GREEN[1])
            classes = green.astype(np.uint8) + 2 * red.astype(np.uint8)
        return np.minimum(classes, len(self.classes) - 1).astype(np.uint8)


def coding_of(labels: Mapping[str, Any] | None, threshold: int | None) -> MaskCoding:
    """The coding that ``data.labels`` (name: number, or name: [red, green, blue]) and ``data.threshold`` describe.

    ``background`` may be named; otherwise it is 0 or black.

    Raises:
        InputError: names or values that cannot be.
    """
    if threshold is not None and not (isinstance(threshold, int) and 0 <= threshold < 65535):
        raise InputError(f"data.threshold={threshold} must be a grey level, 0 to 65534.")
    if not labels:
        return MaskCoding(threshold=threshold)
    if threshold is not None:
        raise InputError("data.threshold and data.labels exclude each other; give one of the two.")
    values = {str(name): _value(str(name), value) for name, value in labels.items()}
    colours = {isinstance(value, tuple) for value in values.values()}
    if len(colours) > 1:
        raise InputError("data.labels mixes grey levels and colours; give one or the other for every class.")
    colour = colours.pop()
    background = values.pop("background", (0, 0, 0) if colour else 0)
    classes, written = ("background", *values), (background, *values.values())
    if len(classes) < 2:
        raise InputError("data.labels names no class but the background; add NAME: VALUE.")
    if len(classes) > 255:
        raise InputError(f"data.labels names {len(classes)} classes; 255 are possible.")
    if len(set(written)) < len(written):
        raise InputError(
            f"data.labels={dict(labels)} gives two classes one value; the background is {background} unless named."
        )
    return MaskCoding("colours" if colour else "greys", classes, written)


def read_labels(paths: tuple[Path, ...], coding: MaskCoding) -> Labels:
    """Class indices (H, W) of one image, several masks of it merged (the higher class wins).

    Raises:
        InputError: a mask cannot be read or decoded, or two masks of an image differ in size.
    """
    merged: Labels | None = None
    for path in paths:
        labels = coding.decode(read_mask(path), path)
        if merged is not None and labels.shape != merged.shape:
            raise InputError(
                f"{path} is {_size(labels)}, but {paths[0].name}, a mask of the same image, {_size(merged)}."
            )
        merged = labels if merged is None else np.maximum(merged, labels)
    assert merged is not None
    return merged


def _value(name: str, value: Any) -> int | tuple[int, int, int]:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 65535:
        return value
    if isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in value):
        return int(value[0]), int(value[1]), int(value[2])
    raise InputError(
        f"data.labels.{name}={value} must be a grey level (0 to 65535) or [red, green, blue] (0 to 255 each)."
    )


def _packed(colours: NDArray[Any]) -> NDArray[np.int64]:
    """(..., 3) red, green and blue as one number each."""
    wide = colours.astype(np.int64)
    return np.asarray(wide[..., 0] << 32 | wide[..., 1] << 16 | wide[..., 2])


def _is_black_and_one(codes: NDArray[Any]) -> bool:
    low, high = codes.min(), codes.max()
    return bool((low == 0) | (low == high)) and bool(((codes == low) | (codes == high)).all())


def _nearest(pixels: NDArray[np.float32], values: NDArray[np.float32]) -> Labels:
    """Index of the nearest of ``values`` (k, c) for every pixel (H, W, c)."""
    best = np.full(pixels.shape[:2], np.inf, np.float32)
    labels = np.zeros(pixels.shape[:2], np.uint8)
    for index, value in enumerate(values):
        distance = ((pixels - value) ** 2).sum(2)
        closer = distance < best
        labels[closer], best[closer] = index, distance[closer]
    return labels


def _counted(codes: NDArray[np.int64], colour: bool) -> str:
    """``0: 900 pixels, 3: 200 pixels``, the most frequent ones."""
    values, counts = np.unique(codes, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_SHOWN]
    names = [f"{_named(int(values[i]), colour)}: {counts[i]} pixels" for i in sorted(order)]
    return ", ".join(names) + (f", ... ({len(values)} values)" if len(values) > _SHOWN else "")


def _named(code: int, colour: bool) -> str:
    return f"[{code >> 32}, {code >> 16 & 0xFFFF}, {code & 0xFFFF}]" if colour else str(code)


def _size(array: NDArray[Any]) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"
