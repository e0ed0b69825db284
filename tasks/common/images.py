"""Reading one picture file: PNG, JPEG, TIFF, BMP, GIF or PPM, 1, 8 or 16 bits, grey, palette, RGB or RGBA, of any size.

An image keeps its depth and becomes (H, W, 1) or (H, W, 3); a mask keeps the numbers that its author wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kernels.errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm")
MASK_SUFFIXES = (*IMAGE_SUFFIXES, ".npy")
LOSSY = (".jpg", ".jpeg")
Pixels = NDArray[Any]
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF")
_LARGEST = 178_956_970  # pixels; what is larger is a slide


@dataclass(frozen=True)
class MaskPixels:
    """A mask as it is in its file.

    Attributes:
        array: (H, W) or (H, W, 3) integers or bool. A palette of colours gives indices, a palette of greys the greys.
        colours: (H, W, 3) uint8 where ``array`` holds the indices of a colour palette, else None.
        lossy: it went through JPEG, so that its values are about, not exactly, what was drawn.
    """

    array: Pixels
    colours: NDArray[np.uint8] | None = None
    lossy: bool = False


def read_image(path: Path) -> Pixels:
    """Grey (H, W, 1) or RGB (H, W, 3), uint8 or uint16; transparency dropped, the camera's orientation applied.

    Raises:
        InputError: the file is missing, empty, damaged, no image of these formats, or of another depth.
    """
    array = _decoded(path, _image_of_pillow)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] > 4 or min(array.shape) == 0:
        raise InputError(f"{path} holds an array of shape {array.shape}; give grey or RGB images, one per file.")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{path} holds {array.dtype} samples; give images of 8 or 16 bits.")
    return np.ascontiguousarray(array[..., :1] if array.shape[2] < 3 else array[..., :3])


def read_mask(path: Path) -> MaskPixels:
    """The numbers of a mask file; ``.npy`` files are read too, without pickle.

    Raises:
        InputError: as for :func:`read_image`, or the numbers are no integers.
    """
    palette: list[NDArray[np.uint8]] = []
    array = _decoded(path, lambda p: _mask_of_pillow(p, palette))
    if array.dtype.kind == "f" and array.size and bool((array == np.rint(array)).all()):
        array = array.astype(np.int64)
    if array.dtype.kind not in "bui":
        raise InputError(f"{path} holds {array.dtype} samples; a mask must hold whole numbers.")
    if array.ndim == 3 and array.shape[2] in (1, 2):  # grey, or grey and transparency
        array = array[..., 0]
    if array.ndim == 3 and array.shape[2] in (3, 4):
        array = _grey_if_equal(array[..., :3])
    elif array.ndim != 2:
        raise InputError(
            f"{path} holds an array of shape {array.shape}; a mask has height and width, and colours at most."
        )
    if min(array.shape) == 0:
        raise InputError(f"{path} has no pixels.")
    return MaskPixels(array, palette[0] if palette else None, path.suffix.lower() in LOSSY)


def _decoded(path: Path, of_pillow: Callable[[Path], Pixels]) -> Pixels:
    """Samples of the file; whatever a decoder says of a damaged one becomes a sentence."""
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty (0 bytes); copy it again or remove it.")
        suffix = path.suffix.lower()
        if suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        return _read_tiff(path, of_pillow) if suffix in (".tif", ".tiff") else of_pillow(path)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; correct the path or take it off the list.") from None
    except Exception as error:  # every decoder has its own exceptions for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:150]
        raise InputError(f"{path} cannot be read as an image ({reason}); copy it again or remove it.") from error


def _image_of_pillow(path: Path) -> Pixels:
    with Image.open(path, formats=_FORMATS) as image:
        _check(path, image)
        if _is_deep_png(path, image):
            return _read_deep_png(path, image)
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "P":
            greys = _greys_of_palette(upright)
            return greys if greys is not None else _colours_of_palette(upright)
        if upright.mode == "I":  # PGM of more than 8 bits
            return np.asarray(upright).astype(np.uint16)
        if upright.mode in ("1", "L", "LA", "I;16", "RGB", "RGBA"):
            return np.asarray(upright)
        return np.asarray(upright.convert("RGB"))


def _mask_of_pillow(path: Path, palette: list[NDArray[np.uint8]]) -> Pixels:
    with Image.open(path, formats=_FORMATS) as image:
        _check(path, image)
        if _is_deep_png(path, image):
            return _read_deep_png(path, image)
        image.load()
        if image.mode == "P":
            greys = _greys_of_palette(image)
            if greys is not None:
                return greys
            palette.append(_colours_of_palette(image))
        elif image.mode not in ("1", "L", "LA", "I;16", "I", "RGB", "RGBA"):
            return np.asarray(image.convert("RGB"))
        return np.asarray(image)


def _is_deep_png(path: Path, image: Image.Image) -> bool:
    """A PNG of 16 bits in colour, which Pillow would reduce to 8."""
    if image.format != "PNG" or image.mode == "I;16":
        return False
    with path.open("rb") as file:
        return file.read(25)[24:25] == b"\x10"


def _read_deep_png(path: Path, image: Image.Image) -> Pixels:
    image.load()  # a truncated file is an error here and only a warning in OpenCV
    decoded = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None:
        raise ValueError("the data are damaged")
    return np.asarray(decoded[..., [2, 1, 0]] if decoded.ndim == 3 else decoded)


def _greys_of_palette(image: Image.Image) -> Pixels | None:
    """Grey of every pixel when all colours that are used are grey, else None."""
    return (lambda a: a if a.ndim == 2 else None)(_grey_if_equal(_colours_of_palette(image)))


def _colours_of_palette(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3); through RGBA, because Pillow warns of palettes of which some entries are transparent."""
    return np.asarray(image.convert("RGBA").convert("RGB"))


def _grey_if_equal(array: Pixels) -> Pixels:
    """(H, W) where red, green and blue are the same everywhere, else as given."""
    first = array[..., 0]
    same = bool((first == array[..., 1]).all()) and bool((first == array[..., 2]).all())
    return np.ascontiguousarray(first) if same else array


def _read_tiff(path: Path, of_pillow: Callable[[Path], Pixels]) -> Pixels:
    with tifffile.TiffFile(path) as file:
        if len(file.pages) > 1:
            raise InputError(f"{path} holds {len(file.pages)} pages; give one image per file.")
        page = file.pages.first
        _check_size(path, page.imagewidth, page.imagelength)
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            return of_pillow(path)
        array = np.asarray(page.asarray())
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind == "u":
            array = np.iinfo(array.dtype).max - array
        return np.moveaxis(array, 0, -1) if page.axes.startswith("S") else array


def _check(path: Path, image: Image.Image) -> None:
    _check_size(path, *image.size)
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{path} is an animation; give one image per file.")


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > _LARGEST:
        raise InputError(f"{path} has {width} x {height} pixels, too many for one image; slides are for tasks.wsi_mil.")
