"""A slide: one class over OpenSlide's formats and over plain TIFF images OpenSlide refuses.

All coordinates are level-0 pixels, x before y. Pixels come back as RGB uint8 ``(height, width, 3)``; what a scanner
left transparent, and what lies outside the slide, is white.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

import cv2
import numpy as np
import openslide
import tifffile

from kernels.errors import InputError
from tasks.wsi_mil.resolution import find_resolution

log = logging.getLogger(__name__)

PLAIN_SUFFIXES = (".tif", ".tiff")
MAX_PLAIN_PIXELS = 300_000_000  # an untiled image is held in memory: 0.9 GB
STRIP_PIXELS = 32_000_000  # a larger region is read strip by strip: 128 MB at a time
_BLOCK = 64  # a damaged slide is looked over in squares of this side
CACHE_BYTES = 64 << 20  # decoded tiles of one open slide
# A level whose downsample is this close to the wanted one is taken as it stands: 4.0001 is 4.
LEVEL_TOLERANCE = 0.01


class Slide:
    """An open slide. Use as a context manager; ``open_slide`` makes one.

    Attributes:
        path: the file.
        slide_id: its name without folder and suffix.
        dimensions: (width, height) of level 0, pixels.
        level_dimensions: the same of each level.
        level_downsamples: level-0 pixels per pixel of each level, 1.0 first.
        properties: the header, names as OpenSlide gives them.
    """

    def __init__(self, path: str | Path, mpp: float | None = None) -> None:
        self.path = Path(path)
        self.slide_id = self.path.stem
        self._override = mpp
        self._reader = _open_reader(self.path)
        self.properties: Mapping[str, str] = self._reader.properties
        self.level_dimensions = self._reader.level_dimensions
        self.dimensions = self.level_dimensions[0]
        self.level_downsamples = self._reader.level_downsamples

    @property
    def mpp(self) -> float:
        """Micrometres per level-0 pixel.

        Raises:
            InputError: the header does not say and none was given.
        """
        return find_resolution(self.properties, self.slide_id, self._override).mpp

    @property
    def mpp_source(self) -> str:
        """Where ``mpp`` was found."""
        return find_resolution(self.properties, self.slide_id, self._override).source

    def level_for(self, downsample: float) -> int:
        """The coarsest level that is not coarser than ``downsample``, so that reading never enlarges."""
        fine = [i for i, d in enumerate(self.level_downsamples) if d <= downsample * (1 + LEVEL_TOLERANCE)]
        return max(fine, key=lambda i: self.level_downsamples[i], default=0)

    def read_region(self, x: int, y: int, width: int, height: int, downsample: float = 1.0) -> np.ndarray:
        """The region at ``1 / downsample`` of its size, RGB uint8 ``(round(height / d), round(width / d), 3)``.

        Read from the coarsest level that is fine enough and reduced by area averaging; never enlarged.

        Args:
            x, y: top-left corner, level-0 pixels; may lie outside.
            width, height: level-0 pixels.
            downsample: level-0 pixels per returned pixel, at least 1.

        Raises:
            InputError: the file cannot be read there, not even from level 0.
        """
        if downsample < 1 - LEVEL_TOLERANCE:
            raise ValueError(f"downsample={downsample} would enlarge; it must be at least 1")
        size = max(1, round(width / downsample)), max(1, round(height / downsample))
        level = self.level_for(downsample)
        try:
            return self._read_level(x, y, width, height, level, size)
        except _UnreadableError as error:
            self._reopen()
            if level > 0:
                log.warning(
                    "slide '%s': level %d is damaged at (%d, %d); read from level 0", self.slide_id, level, x, y
                )
                with contextlib.suppress(_UnreadableError):
                    return self._read_level(x, y, width, height, 0, size)
                self._reopen()
            raise InputError(
                f"slide '{self.path}': the region at ({x}, {y}) cannot be read ({error}); the file is damaged or "
                "incomplete, copy it again from its source."
            ) from error

    def thumbnail(self, max_side: int, on_bad: str = "error") -> np.ndarray:
        """The whole slide, RGB uint8, its longer side at most ``max_side`` pixels (never enlarged)."""
        return self.read_whole(max(1.0, max(self.dimensions) / max_side), on_bad)

    def read_whole(self, downsample: float, on_bad: str = "error") -> np.ndarray:
        """The whole slide at ``1 / downsample`` of its size.

        Raises:
            InputError: a part cannot be read and ``on_bad`` is not ``white``, which leaves such parts white.
        """
        width, height = self.dimensions
        if on_bad != "white":
            return self.read_region(0, 0, width, height, downsample)
        with contextlib.suppress(InputError):
            return self.read_region(0, 0, width, height, downsample)
        out = np.full((max(1, round(height / downsample)), max(1, round(width / downsample)), 3), 255, np.uint8)
        for top in range(0, out.shape[0], _BLOCK):
            for left in range(0, out.shape[1], _BLOCK):
                rows, columns = min(_BLOCK, out.shape[0] - top), min(_BLOCK, out.shape[1] - left)
                place = round(left * downsample), round(top * downsample)
                with contextlib.suppress(InputError):
                    part = self.read_region(*place, round(columns * downsample), round(rows * downsample), downsample)
                    out[top : top + rows, left : left + columns] = part[:rows, :columns]
        return out

    def close(self) -> None:
        """Release the file."""
        self._reader.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_level(self, x: int, y: int, width: int, height: int, level: int, size: tuple[int, int]) -> np.ndarray:
        """The region read from ``level`` and reduced to ``size`` (width, height)."""
        ratio = self.level_downsamples[level]
        columns, rows = max(1, round(width / ratio)), max(1, round(height / ratio))
        if abs(columns / size[0] - 1) <= LEVEL_TOLERANCE and abs(rows / size[1] - 1) <= LEVEL_TOLERANCE:
            columns, rows = size  # the level is the wanted one: no resizing
        if columns * rows <= STRIP_PIXELS:
            return _reduce(self._reader.read(x, y, level, columns, rows), size)
        out = np.empty((size[1], size[0], 3), np.uint8)
        step = max(1, int(STRIP_PIXELS / columns * size[1] / rows))
        for top in range(0, size[1], step):
            bottom = min(top + step, size[1])
            first, last = round(top * rows / size[1]), round(bottom * rows / size[1])
            strip = self._reader.read(x, y + round(first * ratio), level, columns, max(1, last - first))
            out[top:bottom] = _reduce(strip, (size[0], bottom - top))
        return out

    def _reopen(self) -> None:
        """Start afresh: OpenSlide refuses every call after one has failed."""
        self._reader.close()
        self._reader = _open_reader(self.path)


def open_slide(path: str | Path, mpp: float | None = None) -> Slide:
    """Open a slide.

    Args:
        path: a file of any of OpenSlide's formats, or a plain 8-bit RGB TIFF.
        mpp: micrometres per pixel when the header does not say or is wrong.

    Raises:
        InputError: the file is missing, is no slide, or is damaged.
    """
    return Slide(path, mpp)


class _UnreadableError(Exception):
    """A region could not be decoded."""


class _Reader(Protocol):
    """What a file format must offer."""

    properties: Mapping[str, str]
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]

    def read(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """RGB (height, width, 3); ``x, y`` in level-0 pixels, the size in pixels of ``level``."""
        ...

    def close(self) -> None: ...


def _open_reader(path: Path) -> _Reader:
    if not path.exists():
        raise InputError(f"slide '{path}' does not exist; check the path given in data.slides or input.")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"slide '{path}' is empty (0 bytes); copy it again from its source.")
    try:
        return _OpenSlideReader(path)
    except openslide.OpenSlideUnsupportedFormatError:
        if path.suffix.lower() in PLAIN_SUFFIXES:
            return _PlainTiffReader(path)
        raise InputError(
            f"slide '{path}' is in no format OpenSlide reads; give a scanner file or a tiled RGB TIFF."
        ) from None
    except openslide.OpenSlideError as error:
        raise InputError(f"slide '{path}' cannot be opened ({error}); the file is damaged or incomplete.") from error
    except OSError as error:
        raise InputError(
            f"slide '{path}' cannot be opened ({error.strerror or error}); check its permissions."
        ) from error


class _OpenSlideReader:
    """A file OpenSlide reads."""

    def __init__(self, path: Path) -> None:
        self._slide = openslide.OpenSlide(path)
        self._slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        self.properties: Mapping[str, str] = dict(self._slide.properties)
        self.level_dimensions = tuple(self._slide.level_dimensions)
        self.level_downsamples = tuple(float(d) for d in self._slide.level_downsamples)

    def read(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        try:
            rgba = np.asarray(self._slide.read_region((x, y), level, (width, height)))
        except openslide.OpenSlideError as error:
            raise _UnreadableError(" ".join(str(error).split())) from error
        return _on_white(rgba)

    def close(self) -> None:
        self._slide.close()


class _PlainTiffReader:
    """An untiled RGB TIFF, held in memory."""

    def __init__(self, path: Path) -> None:
        try:
            with tifffile.TiffFile(path) as tiff:
                self._image, self.properties = self._first_page(path, tiff)
        except InputError:
            raise
        except Exception as error:  # tifffile and its codecs raise many kinds of errors on a broken file
            raise InputError(
                f"slide '{path}' cannot be read as TIFF ({type(error).__name__}: {' '.join(str(error).split())}); "
                "the file is damaged or of an unsupported kind."
            ) from error
        height, width = self._image.shape[:2]
        self.level_dimensions: tuple[tuple[int, int], ...] = ((width, height),)
        self.level_downsamples: tuple[float, ...] = (1.0,)

    @staticmethod
    def _first_page(path: Path, tiff: tifffile.TiffFile) -> tuple[np.ndarray, Mapping[str, str]]:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        shape = page.shape
        if page.dtype != np.uint8 or len(shape) != 3 or page.samplesperpixel not in (3, 4):
            raise InputError(
                f"slide '{path}' is neither a format of OpenSlide nor a plain 8-bit RGB image (first page: "
                f"{' x '.join(map(str, shape))}, {page.dtype}); convert it to a tiled RGB TIFF."
            )
        if page.imagewidth * page.imagelength > MAX_PLAIN_PIXELS:
            raise InputError(
                f"slide '{path}' is an untiled image of {page.imagewidth} x {page.imagelength} pixels, too large to "
                "hold in "
                "memory; convert it to a tiled pyramid (for example: vips tiffsave in.tif out.tif --tile --pyramid)."
            )
        image = page.asarray()
        if image.shape[-1] != page.samplesperpixel:  # planes one after the other
            image = np.ascontiguousarray(np.moveaxis(image, 0, -1))
        units = {2: "inch", 3: "centimeter"}
        tags = {
            name: page.tags[name].value
            for name in ("XResolution", "ResolutionUnit", "ImageDescription")
            if name in page.tags
        }
        properties = {"tiff.ImageDescription": str(tags.get("ImageDescription", ""))}
        if "XResolution" in tags and tags["XResolution"][1]:
            properties["tiff.XResolution"] = repr(tags["XResolution"][0] / tags["XResolution"][1])
            properties["tiff.ResolutionUnit"] = units.get(int(tags.get("ResolutionUnit", 2)), "none")
        return (_on_white(image) if image.shape[-1] == 4 else image), properties

    def read(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        rows, columns = self._image.shape[:2]
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, columns), min(y + height, rows)
        if (left, top, right, bottom) == (x, y, x + width, y + height):
            return self._image[y:bottom, x:right]
        out = np.full((height, width, 3), 255, np.uint8)
        if left < right and top < bottom:
            out[top - y : bottom - y, left - x : right - x] = self._image[top:bottom, left:right]
        return out

    def close(self) -> None:
        pass


def _on_white(rgba: np.ndarray) -> np.ndarray:
    """RGBA over white, (h, w, 3)."""
    # All pixels opaque: the conjunction of all pixels still has a full alpha. Eight times faster than
    # the minimum over every fourth byte, and this is done for every tile.
    together = np.bitwise_and.reduce(np.ascontiguousarray(rgba).view(np.uint32), axis=None)
    if np.full(1, together, np.uint32).view(np.uint8)[3] == 255:
        return cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    weight = rgba[..., 3:].astype(np.uint16)
    blended = rgba[..., :3] * weight + (255 - weight) * np.uint16(255)
    return ((blended + 127) // 255).astype(np.uint8)


def _reduce(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``image`` brought to ``size`` (width, height) by area averaging, which is what antialiasing is when shrinking."""
    if (image.shape[1], image.shape[0]) == size:
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


# ---------------------------------------------------------------------------------------------------------------------
# Which files are slides
# ---------------------------------------------------------------------------------------------------------------------

SUFFIXES = (
    ".svs", ".ndpi", ".mrxs", ".tif", ".tiff", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".dcm",
)  # fmt: skip


def files_of_slides(folder: Path) -> Iterator[Path]:
    """Every file under ``folder`` that can be a slide, sorted; hidden files and folders are left out.

    A DICOM series is many files in one folder; its first file stands for it.
    """
    series: set[str] = set()
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix.lower() == ".dcm":
            name = _dicom_series(path)
            if name in series:
                continue
            series.add(name)
        yield path


def _dicom_series(path: Path) -> str:
    try:
        with openslide.OpenSlide(path) as slide:
            return slide.properties.get("dicom.SeriesInstanceUID", str(path))
    except openslide.OpenSlideError:
        return str(path)  # reported as unreadable when its turn comes
