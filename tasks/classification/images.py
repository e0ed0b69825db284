"""Reading one image: PNG, JPEG, TIFF or BMP, 8 or 16 bits, grey or RGB, as 8-bit RGB."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kernels.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
Pixels = NDArray[np.uint8]
_FORMATS = ("PNG", "JPEG", "BMP")
_LARGEST = 178_956_970  # pixels; what is larger is a slide


def read_image(path: Path, window: Sequence[float] | None = None) -> Pixels:
    """The image as RGB (H, W, 3) uint8; grey is repeated, transparency dropped, the camera's orientation applied.

    Args:
        window: the intensities (low, high) of a 16-bit image that become black and white; by default the whole range.

    Raises:
        InputError: the file is missing, empty, damaged, no image of these formats, or of another depth.
    """
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty (0 bytes); copy it again or remove it.")
        array = _read_tiff(path) if path.suffix.lower() in (".tif", ".tiff") else _read_other(path)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; correct the path or take it off the list.") from None
    except Exception as error:  # every decoder has its own exceptions for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:150]
        raise InputError(f"{path} cannot be read as an image ({reason}); copy it again or remove it.") from error
    return to_rgb(array, window, path)


def to_rgb(array: NDArray, window: Sequence[float] | None, path: Path) -> Pixels:
    """Samples (H, W) or (H, W, C) of 1, 8 or 16 bits as RGB (H, W, 3) uint8.

    Raises:
        InputError: the shape or type is another.
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] > 4 or min(array.shape) == 0:
        raise InputError(f"{path} holds an array of shape {array.shape}; give grey or RGB images, one per file.")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        low, high = (0, 65535) if window is None else window
        array = np.clip((array.astype(np.float32) - low) * (255 / (high - low)), 0, 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"{path} holds {array.dtype} samples; give images of 8 or 16 bits.")
    colours = array[..., :1] if array.shape[2] < 3 else array[..., :3]
    return np.ascontiguousarray(np.broadcast_to(colours, (*array.shape[:2], 3)))


def _read_tiff(path: Path) -> NDArray:
    with tifffile.TiffFile(path) as file:
        if len(file.pages) > 1:
            raise InputError(f"{path} holds {len(file.pages)} pages; give one image per file (slides: tasks.wsi_mil).")
        page = file.pages.first
        _check_size(path, page.imagewidth, page.imagelength)
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        array = np.asarray(page.asarray())
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind == "u":
            array = np.iinfo(array.dtype).max - array
        return np.moveaxis(array, 0, -1) if page.axes.startswith("S") else array


def _read_other(path: Path) -> NDArray:
    with Image.open(path, formats=_FORMATS) as image:
        _check_size(path, *image.size)
        if image.format == "PNG" and path.read_bytes()[24] == 16:  # Pillow would reduce the colours of these to 8 bits
            decoded = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
            if decoded is None:
                raise ValueError("the data are damaged")
            return decoded[..., [2, 1, 0]] if decoded.ndim == 3 else decoded
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "P" and "transparency" in upright.info:
            upright = upright.convert("RGBA")
        return np.asarray(upright.convert("RGB"))


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > _LARGEST:
        raise InputError(f"{path} has {width} x {height} pixels, too many for one image; slides are for tasks.wsi_mil.")
