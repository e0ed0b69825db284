"""Where the tissue is: a mask at low magnification and its outlines in level-0 pixels.

The outlines are found as CLAM finds them (saturation, median blur, threshold, closing, two-level contours, area
filters; Lu et al., Nature Biomedical Engineering 2021, doi:10.1038/s41551-020-00682-w) with CLAM's presets, or with
``auto``, which sets threshold and areas from the slide so that a small biopsy is never dropped in silence.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from kernels.errors import InputError, unknown_name
from tasks.common.contours import Contour, rasterise, read_geojson
from tasks.wsi_mil.quality import pen_mask
from tasks.wsi_mil.slides import Slide

log = logging.getLogger(__name__)

SEGMENTATION_DOWNSAMPLE = 64
NATIVE_PIXELS = 40_000_000  # a level up to this size is used as it is; a larger one is reduced while reading
_NATIVE_DOWNSAMPLE = 15.5  # and so is a finer one
SMALLEST_LONG_SIDE = 1024  # a small slide is looked at closer than 64, down to this size of the mask
_REFERENCE_PATCH = 512  # CLAM counts areas in patches of this side at level 0


@dataclass(frozen=True)
class Preset:
    """CLAM's settings.

    Attributes:
        saturation: threshold on the saturation (0 to 255) above which a pixel is tissue.
        median: side of the median filter, odd.
        closing: side of the square that closes gaps; 0 for none.
        min_area, min_hole: smallest piece of tissue and smallest hole, in squares of 512 level-0 pixels.
        max_holes: at most this many holes per piece, the largest.
        otsu: choose the threshold by Otsu's method instead.
    """

    saturation: int
    median: int
    closing: int
    min_area: float
    min_hole: float
    max_holes: int
    otsu: bool = False


PRESETS = {
    "clam": Preset(8, 7, 4, 100, 16, 8),
    "tcga": Preset(8, 7, 4, 16, 4, 8),
    "biopsy": Preset(15, 11, 2, 1, 1, 2),
    "resection": Preset(15, 11, 4, 100, 16, 8),
}


@dataclass(frozen=True)
class TissueOptions:
    """How tissue is found.

    Attributes:
        preset: ``auto``, ``clam``, ``tcga``, ``biopsy`` or ``resection``; ``none`` takes the whole slide.
        saturation, median, closing, min_area, min_hole, max_holes, otsu: replace the preset's value (not for ``auto``).
        reject_pen: cut marker ink out of the tissue.
        reject_blur: leave out tiles whose sharpness is below this (None keeps all; see ``quality.sharpness``).
        annotations: folder with ``SLIDE_ID.geojson`` outlines (QuPath's) that are used where they exist.
    """

    preset: str = "auto"
    saturation: int | None = None
    median: int | None = None
    closing: int | None = None
    min_area: float | None = None
    min_hole: float | None = None
    max_holes: int | None = None
    otsu: bool | None = None
    reject_pen: bool = False
    reject_blur: float | None = None
    annotations: Path | None = None

    def __post_init__(self) -> None:
        known = ["auto", "none", *PRESETS]
        if self.preset not in known:
            raise unknown_name("data.tissue.preset", self.preset, known)
        changed = [n for n in Preset.__dataclass_fields__ if getattr(self, n) is not None]
        if changed and self.preset not in PRESETS:
            raise InputError(
                f"data.tissue.{changed[0]} has no meaning with data.tissue.preset={self.preset}; "
                f"choose one of {', '.join(PRESETS)} to change its values."
            )
        if self.median is not None and (self.median < 1 or self.median % 2 == 0):
            raise InputError(f"data.tissue.median={self.median} must be odd and positive; use {self.median + 1}.")

    def resolved(self) -> Preset:
        """The preset with the user's values in place."""
        base = PRESETS[self.preset]
        given = {name: getattr(self, name) for name in Preset.__dataclass_fields__}
        return Preset(**{name: getattr(base, name) if value is None else value for name, value in given.items()})


@dataclass
class Tissue:
    """Where the tissue is.

    Attributes:
        mask: (h, w) bool over the whole slide.
        scale: (x, y) level-0 pixels per pixel of the mask.
        contours: outlines with holes, level-0 pixels.
        remarks: what a user should know (a filter that was relaxed, an outline of theirs that was used).
    """

    mask: np.ndarray
    scale: tuple[float, float]
    contours: list[Contour]
    remarks: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Tissue area / slide area."""
        return float(self.mask.mean())


def find_tissue(slide: Slide, options: TissueOptions | None = None, on_bad: str = "error") -> Tissue:
    """Tissue of a slide; with ``on_bad="white"`` what cannot be read of it is taken for glass.

    Raises:
        InputError: there is none, the preset's filters leave none, or the slide cannot be read.
    """
    options = options or TissueOptions()
    width, height = slide.dimensions
    drawn = options.annotations / f"{slide.slide_id}.geojson" if options.annotations else None
    if drawn is not None and drawn.is_file():
        return _drawn_tissue(slide, drawn)
    if options.preset == "none":
        whole = Contour(np.array([[0, 0], [width, 0], [width, height], [0, height]], np.int32))
        side = mask_downsample(slide)
        mask = np.ones((math.ceil(height / side), math.ceil(width / side)), bool)
        return Tissue(mask, (width / mask.shape[1], height / mask.shape[0]), [whole])
    image, scale = overview(slide, on_bad)
    if options.preset == "auto":
        tissue = _auto_tissue(image, scale, slide.mpp)
    else:
        tissue = _preset_tissue(image, scale, options.resolved(), options.preset)
    if options.reject_pen:
        tissue = _without_ink(tissue, image)
    if not tissue.contours:
        raise InputError(
            f"slide '{slide.slide_id}': no tissue found; look at its thumbnail, or outline it by hand "
            "(data.tissue.annotations=DIR)."
        )
    return tissue


def overview(slide: Slide, on_bad: str = "error") -> tuple[np.ndarray, tuple[float, float]]:
    """The whole slide at the size tissue is looked for, and (x, y) level-0 pixels per pixel of it.

    The level closest to 64 from below as it stands, as CLAM does; where there is none of a sensible size, a reduced
    image.
    """
    width, height = slide.dimensions
    downsample = mask_downsample(slide)
    level = slide.level_for(downsample)
    if (
        math.prod(slide.level_dimensions[level]) <= NATIVE_PIXELS
        and slide.level_downsamples[level] >= _NATIVE_DOWNSAMPLE
    ):
        downsample = slide.level_downsamples[level]
    image = slide.read_whole(downsample, on_bad)
    return image, (width / image.shape[1], height / image.shape[0])


def mask_downsample(slide: Slide) -> float:
    """64, or less where the mask of a small slide would be too coarse to follow the tissue."""
    return float(min(SEGMENTATION_DOWNSAMPLE, max(1.0, max(slide.dimensions) / SMALLEST_LONG_SIDE)))


def clam_contours(image: np.ndarray, scale: tuple[float, float], preset: Preset) -> tuple[list[Contour], int, float]:
    """Outlines as CLAM finds them.

    Args:
        image: (h, w, 3) RGB uint8 overview.
        scale: (x, y) level-0 pixels per pixel of it.

    Returns:
        the outlines kept, in level-0 pixels; how many pieces there were before the area filter; the area of the largest
        of these in squares of 512 level-0 pixels.
    """
    saturation = cv2.medianBlur(np.ascontiguousarray(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1]), preset.median)
    kind = cv2.THRESH_BINARY | (cv2.THRESH_OTSU if preset.otsu else 0)
    _, binary = cv2.threshold(saturation, 0 if preset.otsu else preset.saturation, 255, kind)
    if preset.closing > 0:
        binary = cv2.morphologyEx(binary, cv2.MORPH_CLOSE, np.ones((preset.closing, preset.closing), np.uint8))
    unit = int(_REFERENCE_PATCH**2 / (scale[0] * scale[1]))
    return filtered_contours(binary, scale, preset.min_area * unit, preset.min_hole * unit, preset.max_holes, unit)


def filtered_contours(
    binary: np.ndarray, scale: tuple[float, float], min_area: float, min_hole: float, max_holes: int, unit: float = 1.0
) -> tuple[list[Contour], int, float]:
    """Outlines of a binary image whose net area is above ``min_area``, with their largest holes above ``min_hole``.

    Areas are in pixels of the image; the third value returned, the largest net area, is in ``unit`` pixels.
    """
    outlines, hierarchy = cv2.findContours(binary, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if hierarchy is None:
        return [], 0, 0.0
    parents = hierarchy[0][:, 3]
    areas = np.array([cv2.contourArea(outline) for outline in outlines])
    net = areas.copy()
    np.subtract.at(net, parents[parents >= 0], areas[parents >= 0])
    outer = np.flatnonzero(parents == -1)
    kept = []
    for index in outer[(net[outer] != 0) & (net[outer] > min_area)]:
        holes = np.flatnonzero(parents == index)
        largest = holes[np.argsort(-areas[holes], kind="stable")][:max_holes]
        inner = [_scaled(outlines[hole], scale) for hole in largest if areas[hole] > min_hole]
        kept.append(Contour(_scaled(outlines[index], scale), inner))
    return kept, len(outer), float(net[outer].max() / unit)


def _scaled(outline: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    return (outline.reshape(-1, 2) * np.asarray(scale)).astype(np.int32)


def _preset_tissue(image: np.ndarray, scale: tuple[float, float], preset: Preset, name: str) -> Tissue:
    contours, pieces, largest = clam_contours(image, scale, preset)
    if pieces and not contours:
        raise InputError(
            f"no tissue left: data.tissue.preset={name} drops all {pieces} pieces because the largest has an area of "
            f"{largest:.2g} (in 512 x 512 level-0 pixels) and min_area is {preset.min_area:g}; use "
            "data.tissue.preset=auto "
            "or biopsy."
        )
    return Tissue(rasterise(contours, image.shape[:2], scale), scale, contours)


# Physical sizes of ``auto``: a square of 10 µm closes gaps between cells; 0.2 mm² is a small biopsy fragment.
_CLOSE_UM = 30.0
_MIN_AREA_MM2 = 0.2
_MIN_HOLE_MM2 = 0.05
_SHARE_OF_LARGEST = 0.02


def _auto_tissue(image: np.ndarray, scale: tuple[float, float], mpp: float) -> Tissue:
    """Tissue with thresholds taken from the slide itself."""
    remarks = []
    binary = _coloured(image)
    pixel = math.sqrt(scale[0] * scale[1]) * mpp  # µm
    if not binary.any():
        binary = _dark(image)
        if binary.any():
            remarks.append("the tissue has no colour; found by darkness")
    side = max(1, round(_CLOSE_UM / pixel))
    if side > 1:
        binary = cv2.morphologyEx(binary, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))
    _, pieces, largest = filtered_contours(binary, scale, math.inf, math.inf, 0)
    if not pieces:
        return Tissue(binary.astype(bool), scale, [], remarks)
    mm2 = pixel * pixel / 1e6
    # A fragment counts when it is 0.2 mm² or, on a slide with little tissue, 2 % of the largest one.
    min_area = min(_MIN_AREA_MM2 / mm2, _SHARE_OF_LARGEST * largest) if largest else 0.0
    contours, _, _ = filtered_contours(binary, scale, min_area, _MIN_HOLE_MM2 / mm2, 64)
    if largest * mm2 < _MIN_AREA_MM2 / 10:
        remarks.append(f"very little tissue: the largest piece is {largest * mm2:.2g} mm²; all pieces are kept")
    return Tissue(rasterise(contours, image.shape[:2], scale), scale, contours, remarks)


def _coloured(image: np.ndarray) -> np.ndarray:
    """Pixels with more colour than the glass, uint8 0 or 255.

    The glass is what is bright and pale; its own tint is divided out first, so that a yellowish lamp is not tissue.
    """
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    glass = (hsv[..., 2] > 200) & (hsv[..., 1] < 40)
    if glass.mean() > 0.01:
        tint = np.median(image[glass], axis=0)
        gain = (tint.max() / tint).astype(np.float32)
        table = np.clip(np.arange(256, dtype=np.float32)[:, None] * gain, 0, 255).round().astype(np.uint8)
        hsv = cv2.cvtColor(cv2.LUT(image, table[None]), cv2.COLOR_RGB2HSV)
    saturation = cv2.medianBlur(np.ascontiguousarray(hsv[..., 1]), 7)
    # Near black the saturation is noise: frames and the edge of the slide have none.
    saturation[hsv[..., 2] < 25] = 0
    otsu, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    # Otsu's threshold splits a slide that is all tissue, or all glass, in two: keep it where tissue begins.
    return cv2.threshold(saturation, float(np.clip(otsu, 10, 20)), 255, cv2.THRESH_BINARY)[1]


def _dark(image: np.ndarray) -> np.ndarray:
    """Pixels clearly darker than the glass but not black, uint8 0 or 255: a slide without colour."""
    grey = cv2.medianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 7)
    bright = float(np.percentile(grey, 99))
    if bright - float(np.percentile(grey, 1)) < 30:
        return np.zeros_like(grey)
    return np.where((grey < 0.85 * bright) & (grey > 25), 255, 0).astype(np.uint8)


def _without_ink(tissue: Tissue, image: np.ndarray) -> Tissue:
    ink = pen_mask(image)
    if not (ink & tissue.mask).any():
        return tissue
    left = np.where(tissue.mask & ~ink, 255, 0).astype(np.uint8)
    contours, _, _ = filtered_contours(left, tissue.scale, 0.0, 0.0, 64)
    share = float((ink & tissue.mask).sum() / max(1, tissue.mask.sum()))
    remarks = [*tissue.remarks, f"{share:.0%} of the tissue is marked with a pen and left out"]
    return Tissue(rasterise(contours, left.shape, tissue.scale), tissue.scale, contours, remarks)


def _drawn_tissue(slide: Slide, path: Path) -> Tissue:
    width, height = slide.dimensions
    side = mask_downsample(slide)
    shape = math.ceil(height / side), math.ceil(width / side)
    scale = width / shape[1], height / shape[0]
    contours, excluded = read_geojson(path)
    mask = rasterise(contours, shape, scale) & ~rasterise(excluded, shape, scale)
    if not mask.any():
        raise InputError(
            f"{path} has no outline with an area inside slide '{slide.slide_id}' ({width} x {height} pixels); redraw "
            "it or remove the file."
        )
    return Tissue(mask, scale, contours, [f"outlines of {path.name} used"])
