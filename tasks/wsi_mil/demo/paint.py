"""Synthetic H&E: one slide as an RGB image at 0.5 micrometres per pixel, with the mask of its planted tumour.

The picture is composed as a section is: two maps say how much haematoxylin and eosin each place holds, and light is
absorbed by both (Beer-Lambert). Everything random comes from the generator passed in, so a seed gives the same pixels.
Large structures are laid out on a grid 16 times coarser, textures on one twice as coarse; nuclei are stamped whole.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]
Points = NDArray[np.float64]

MPP = 0.5
COARSE = 16  # layout masks, the tumour mask among them, have one pixel per 16 x 16

# Optical density per unit of stain for red, green, blue; after Ruifrok and Johnston, 2001, rounded.
_HAEMATOXYLIN = np.array([0.62, 0.72, 0.30])
_EOSIN = np.array([0.12, 0.92, 0.36])
_PENS = ((22, 120, 62), (28, 60, 150))


@dataclass
class Section:
    """A slide being painted: stain concentrations at full size (height, width) and the layout at 1 / COARSE."""

    haematoxylin: Image
    eosin: Image
    tissue: Mask
    tumour: Mask
    fat: Mask


def paint_slide(
    rng: Generator, width: int, height: int, *, with_tumour: bool, pen: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Paint one slide.

    Args:
        width, height: in level-0 pixels, multiples of 16.
        with_tumour: plant one to three regions of crowded, large, dark nuclei.
        pen: draw over it with a marker pen.

    Returns:
        RGB (height, width, 3) and the tumour mask (height / 16, width / 16), 255 inside.
    """
    section = _lay_out(rng, width, height, with_tumour)
    angle = _paint_stroma(rng, section)
    _paint_fat(rng, section)
    glands = _place_glands(rng, section)
    _paint_glands(rng, section, glands)
    _paint_tumour(rng, section)
    _paint_stromal_nuclei(rng, section, angle, glands)
    rgb = _develop(rng, section)
    if pen:
        _draw_pen(rng, rgb, section.tissue)
    return rgb, section.tumour.astype(np.uint8) * 255


# ---- layout -------------------------------------------------------------------------------------------------------


def _lay_out(rng: Generator, width: int, height: int, with_tumour: bool) -> Section:
    h, w = height // COARSE, width // COARSE
    tissue = _blob(rng, h, w, centre=(w / 2, h / 2), radius=(0.35 * w, 0.35 * h), roughness=0.17)
    tissue = _largest_piece(tissue)
    fat = np.zeros((h, w), bool)
    for _ in range(rng.integers(1, 3)):
        fat |= _blob(rng, h, w, _point_inside(rng, tissue), (0.11 * w, 0.14 * h), 0.45)
    fat &= cv2.erode(tissue.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    tumour = np.zeros((h, w), bool)
    if with_tumour:
        room = tissue & ~fat
        inner = cv2.erode(room.astype(np.uint8), np.ones((15, 15), np.uint8)).astype(bool)
        inner = inner if inner.any() else room
        for _ in range(rng.integers(1, 4)):
            side = rng.uniform(0.085, 0.13) * w
            tumour |= _blob(rng, h, w, _point_inside(rng, inner), (side, side * rng.uniform(0.7, 1.2)), 0.3)
        tumour &= room
    return Section(
        haematoxylin=np.zeros((height, width), np.float32),
        eosin=np.zeros((height, width), np.float32),
        tissue=tissue,
        tumour=tumour,
        fat=fat,
    )


def _largest_piece(mask: Mask) -> Mask:
    _, labels, sizes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return labels == 1 + int(sizes[1:, cv2.CC_STAT_AREA].argmax())


def _blob(
    rng: Generator, h: int, w: int, centre: tuple[float, float], radius: tuple[float, float], roughness: float
) -> Mask:
    """An ellipse whose outline smooth noise has moved in and out."""
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    distance = np.hypot((x - centre[0]) / radius[0], (y - centre[1]) / radius[1])
    outline = _noise(rng, h, w, 5) + 0.5 * _noise(rng, h, w, 14) + 0.2 * _noise(rng, h, w, 40)
    return distance + roughness * outline < 1


def _point_inside(rng: Generator, mask: Mask) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    chosen = rng.integers(len(rows))
    return float(columns[chosen]), float(rows[chosen])


def _noise(rng: Generator, h: int, w: int, cells: int) -> Image:
    """Smooth noise (h, w) with about ``cells`` bumps across, mean 0 and standard deviation near 0.5."""
    grid = rng.standard_normal((max(2, cells * h // w) + 1, cells + 1), dtype=np.float32)
    return cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC) * 0.7


def _full(section: Section, mask: Mask, soften: float = 0) -> Image:
    """A layout mask at full size, 0 to 1, its outline smooth rather than in steps."""
    h, w = section.eosin.shape
    half = cv2.resize(mask.astype(np.float32), (w // 4, h // 4), interpolation=cv2.INTER_CUBIC)
    half = cv2.GaussianBlur(half, (0, 0), 4 + soften)
    half = np.clip((half - 0.5) * (6 / (1 + soften)) + 0.5, 0, 1)
    return cv2.resize(half, (w, h), interpolation=cv2.INTER_LINEAR)


# ---- tissue -------------------------------------------------------------------------------------------------------


def _paint_stroma(rng: Generator, section: Section) -> Image:
    """Wavy bundles of collagen; returns their direction (height / 2, width / 2), radians."""
    height, width = section.eosin.shape
    h, w = height // 2, width // 2
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    flow = _noise(rng, h, w, 4)
    turn = float(rng.uniform(0, np.pi))
    across = x * np.float32(np.sin(turn)) - y * np.float32(np.cos(turn))
    warp = 140 * flow + 22 * _noise(rng, h, w, 16) + 5 * _noise(rng, h, w, 60)
    coarse, fine = np.sin((across + warp) * 0.16), np.sin((across + 1.3 * warp) * 0.55)
    grain = cv2.resize(rng.standard_normal((h // 2, w // 2), dtype=np.float32), (w, h))
    density = 0.42 + 0.10 * coarse + 0.07 * fine + 0.06 * grain + 0.10 * _noise(rng, h, w, 10)
    gaps = np.clip(_noise(rng, h, w, 26) + 0.55 * coarse - 0.75, 0, 1)  # clefts between the bundles
    eosin = np.clip(density * (1 - gaps), 0.02, 1)
    tissue = _full(section, section.tissue)
    section.eosin[:] = cv2.resize(eosin, (width, height), interpolation=cv2.INTER_LINEAR) * tissue
    section.haematoxylin[:] = 0.10 * section.eosin
    # The direction in which the phase does not change.
    gradient_x, gradient_y = cv2.Sobel(across + warp, cv2.CV_32F, 1, 0), cv2.Sobel(across + warp, cv2.CV_32F, 0, 1)
    return np.arctan2(gradient_x, -gradient_y).astype(np.float32)


def _paint_fat(rng: Generator, section: Section) -> None:
    """White vacuoles about 60 micrometres wide between thin membranes."""
    if not section.fat.any():
        return
    height, width = section.eosin.shape
    h, w = height // 2, width // 2
    centres = _jittered_grid(rng, w, h, 58, 0.28)
    centres = centres[_inside(section.fat, centres * 2)]
    if len(centres) == 0:
        return
    # Each pixel belongs to the nearest centre; the membranes are where two territories meet.
    seeds = np.full((h, w), 255, np.uint8)
    at = centres.astype(int)
    seeds[at[:, 1], at[:, 0]] = 0
    distance, labels = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    edges = (cv2.morphologyEx(labels.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0) | (
        distance > 42
    )
    rounded = cv2.GaussianBlur(edges.astype(np.float32), (0, 0), 2.2)
    membrane = np.clip(rounded * 3.2 - 0.25, 0, 1)
    membrane = cv2.resize(membrane, (width, height), interpolation=cv2.INTER_LINEAR)
    fat = _full(section, section.fat)
    keep = 1 - fat * (1 - 0.75 * membrane)
    section.eosin *= keep
    section.haematoxylin *= keep


@dataclass
class Glands:
    """Centres (n, 2) x, y and mean radii (n,), pixels, and outlines (n, 48, 2)."""

    centres: Points
    radii: NDArray[np.float64]
    outlines: Points


def _place_glands(rng: Generator, section: Section) -> Glands:
    height, width = section.eosin.shape
    centres = _jittered_grid(rng, width, height, 235, 0.3)
    room = section.tissue & ~section.fat & ~section.tumour
    room = cv2.erode(room.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
    rows, columns = section.tissue.shape
    present = _noise(rng, rows, columns, 6) > -0.05  # glands keep together
    centres = centres[_inside(room & present, centres)]
    radii = rng.uniform(58, 100, len(centres))
    turns = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    shape = np.ones((len(centres), 48))
    for waves in (2, 3, 5):
        shape += rng.normal(0, 0.22 / waves, (len(centres), 1)) * np.sin(
            waves * turns + rng.uniform(0, 2 * np.pi, (len(centres), 1))
        )
    reach = shape * radii[:, None]
    outlines = centres[:, None] + reach[..., None] * np.stack([np.cos(turns), np.sin(turns)], -1)
    return Glands(centres, radii, outlines)


def _paint_glands(rng: Generator, section: Section, glands: Glands) -> None:
    """An epithelium with nuclei at its base around an empty lumen."""
    height, width = section.eosin.shape
    body = np.zeros((height // 2, width // 2), np.uint8)
    lumen = np.zeros_like(body)
    for centre, radius, outline in zip(glands.centres, glands.radii, glands.outlines, strict=True):
        cv2.fillPoly(body, [_fixed(outline / 2)], 255, cv2.LINE_AA, 4)
        opening = (radius - 44) / radius * rng.uniform(0.8, 1.05)
        cv2.fillPoly(lumen, [_fixed((centre + opening * (outline - centre)) / 2)], 255, cv2.LINE_AA, 4)
    body_share = _grow(body, width, height)
    lumen_share = _grow(lumen, width, height)
    grain = 0.05 * _noise(rng, height, width, width // 10)
    section.eosin += body_share * (0.36 + grain - section.eosin)
    section.haematoxylin += body_share * (0.16 - grain - section.haematoxylin)
    section.eosin *= 1 - 0.97 * lumen_share
    section.haematoxylin *= 1 - 0.97 * lumen_share
    for centre, radius, outline in zip(glands.centres, glands.radii, glands.outlines, strict=True):
        count = int(2 * np.pi * radius / 15)
        turns = (np.arange(count) + rng.uniform(-0.25, 0.25, count)) * (48 / count) % 48
        base = outline[turns.astype(int) % 48]
        inward = centre - base
        length = np.hypot(*inward.T)[:, None]
        at = base + inward / length * rng.uniform(12, 22, (count, 1))
        _stamp(rng, section, at, "epithelial", np.arctan2(inward[:, 1], inward[:, 0]))


def _paint_tumour(rng: Generator, section: Section) -> None:
    """Sheets of cells whose nuclei are two to three times the usual size, uneven, dark, and nearly touching."""
    if not section.tumour.any():
        return
    height, width = section.eosin.shape
    share = _full(section, section.tumour)
    grain = 0.06 * _noise(rng, height, width, width // 24)
    section.eosin += share * (0.34 + grain - section.eosin)
    section.haematoxylin += share * (0.17 - grain - section.haematoxylin)
    centres = _jittered_grid(rng, width, height, 30, 0.45)
    centres = centres[_inside(section.tumour & _shrunk(section.tissue), centres)]
    centres = centres[rng.random(len(centres)) < 0.93]
    _stamp(rng, section, centres, "tumour", rng.uniform(0, 2 * np.pi, len(centres)))


def _paint_stromal_nuclei(rng: Generator, section: Section, direction: Image, glands: Glands) -> None:
    """Spindle-shaped fibroblasts along the fibres, and lymphocytes: strewn, and in a few small aggregates."""
    height, width = section.eosin.shape
    tissue = _shrunk(section.tissue)
    free = tissue & ~section.tumour
    spindles = _outside(glands, _jittered_grid(rng, width, height, 62, 0.45))
    spindles = spindles[_inside(free & ~section.fat, spindles)]
    at = (spindles / 2).astype(int)
    _stamp(rng, section, spindles, "spindle", direction[at[:, 1], at[:, 0]] + rng.normal(0, 0.2, len(spindles)))
    strewn = rng.uniform((0, 0), (width, height), (int(width * height / 9000), 2))
    groups = [strewn]
    for _ in range(rng.integers(1, 4)):
        middle = np.array(_point_inside(rng, free)) * COARSE
        groups.append(middle + rng.normal(0, rng.uniform(35, 75), (rng.integers(60, 160), 2)))
    lymphocytes = _outside(glands, np.concatenate(groups))
    lymphocytes = lymphocytes[_inside(tissue & ~section.fat, lymphocytes)]
    _stamp(rng, section, lymphocytes, "lymphocyte", rng.uniform(0, 2 * np.pi, len(lymphocytes)))


# ---- nuclei -------------------------------------------------------------------------------------------------------

# Half axes in pixels (mean, spread) along and across, haematoxylin (mean, spread), unevenness of outline and chromatin.
_NUCLEI: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float], float, float]] = {
    "lymphocyte": ((6.5, 0.5), (6.2, 0.5), (1.25, 0.10), 0.04, 0.10),
    "spindle": ((13.0, 2.5), (3.3, 0.5), (0.85, 0.12), 0.05, 0.10),
    "epithelial": ((10.5, 1.2), (6.3, 0.7), (0.85, 0.10), 0.05, 0.16),
    "tumour": ((15.0, 3.6), (11.5, 2.8), (1.05, 0.25), 0.11, 0.30),
}
_VARIANTS = 160
_BOX = 48


def _stamp(rng: Generator, section: Section, centres: Points, kind: str, angles: NDArray[np.floating]) -> None:
    """Put nuclei of one kind at ``centres`` (n, 2) x, y, turned to ``angles`` in radians."""
    if len(centres) == 0:
        return
    height, width = section.eosin.shape
    stamps, turns = _nucleus_library(kind)
    # The variant whose own angle is nearest, out of those drawn at random for this nucleus.
    drawn = rng.integers(0, _VARIANTS, (len(centres), 6))
    off = np.abs((turns[drawn] - np.asarray(angles)[:, None] + np.pi / 2) % np.pi - np.pi / 2)
    chosen = drawn[np.arange(len(centres)), off.argmin(1)]
    corners = np.round(centres - _BOX / 2).astype(int)
    fits = ((corners >= 0) & (corners + _BOX <= (width, height))).all(1)
    for (x, y), variant in zip(corners[fits], chosen[fits], strict=True):
        here = section.haematoxylin[y : y + _BOX, x : x + _BOX]
        np.maximum(here, stamps[variant], out=here)


@functools.cache
def _nucleus_library(kind: str) -> tuple[Image, NDArray[np.floating]]:
    """Nuclei of one kind (_VARIANTS, _BOX, _BOX) as haematoxylin, and the angle each is turned to."""
    along, across, stain, outline, chromatin = _NUCLEI[kind]
    n = _VARIANTS
    rng = np.random.default_rng(list(kind.encode()))  # every slide draws from the same nuclei
    turns = np.linspace(0, np.pi, n, endpoint=False)
    y, x = (np.mgrid[0:_BOX, 0:_BOX] - (_BOX - 1) / 2).astype(np.float32)
    cos, sin = np.cos(turns)[:, None, None], np.sin(turns)[:, None, None]
    u, v = x * cos + y * sin, y * cos - x * sin
    a, b = (np.clip(rng.normal(*axis, n), 0.5 * axis[0], 21)[:, None, None] for axis in (along, across))
    distance = np.hypot(u / a, v / b)
    around = np.arctan2(v, u)
    for waves in (1, 2, 3):
        phase = rng.uniform(0, 2 * np.pi, (n, 1, 1))
        distance *= 1 + rng.normal(0, outline / waves, (n, 1, 1)) * np.sin(waves * around + phase)
    edge = np.clip((1 - distance) * np.sqrt(a * b) * 0.7 + 0.5, 0, 1)  # about a pixel and a half wide
    grain = rng.standard_normal((n, _BOX // 4, _BOX // 4))
    grain = np.stack([cv2.resize(g, (_BOX, _BOX), interpolation=cv2.INTER_CUBIC) for g in grain])
    rim = 0.22 * np.clip(distance * 2 - 1, 0, 1)  # chromatin lies denser at the membrane
    level = rng.normal(*stain, n)[:, None, None]
    stain_map = edge * np.clip(level * (0.85 + rim + chromatin * grain), 0.15, 2.2)
    return np.asarray(stain_map, dtype=np.float32), turns


def _jittered_grid(rng: Generator, width: int, height: int, step: float, jitter: float) -> Points:
    """Points (n, 2) x, y inside the image, one per cell of a grid, moved by up to ``jitter`` of a cell."""
    x, y = np.meshgrid(np.arange(step / 2, width, step), np.arange(step / 2, height, step))
    x[1::2] += step / 2
    points = np.stack([x, y], -1).reshape(-1, 2)
    points += rng.uniform(-jitter, jitter, points.shape) * step
    return points[((points >= 0) & (points < (width, height))).all(1)]


def _inside(mask: Mask, points: Points) -> Mask:
    """Which level-0 points lie in a layout mask."""
    at = np.floor(points / COARSE).astype(int)
    rows, columns = at[:, 1], at[:, 0]
    valid = (rows >= 0) & (rows < mask.shape[0]) & (columns >= 0) & (columns < mask.shape[1])
    return valid & mask[rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1)]


def _shrunk(mask: Mask) -> Mask:
    """The mask without the 16 pixels along its outline, so that no nucleus hangs over it."""
    return cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)


def _outside(glands: Glands, points: Points) -> Points:
    """The points that are in no gland."""
    if len(glands.centres) == 0:
        return points
    away = np.hypot(*(points[:, None] - glands.centres).transpose(2, 0, 1)) > 1.15 * glands.radii
    return points[away.all(1)]


def _fixed(points: Points) -> NDArray[np.int32]:
    """For cv2's drawing with 4 fractional bits."""
    return np.round(points * 16).astype(np.int32)


def _grow(half: NDArray, width: int, height: int) -> Image:
    whole: Image = cv2.resize(half, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32)
    return whole / np.float32(255)


# ---- light --------------------------------------------------------------------------------------------------------


def _develop(rng: Generator, section: Section) -> NDArray[np.uint8]:
    """Stain concentrations to RGB, with this slide's own stains, strength and scanner white."""
    strength_h, strength_e = rng.normal(1.05, 0.09), rng.normal(0.80, 0.08)
    density_h = (_HAEMATOXYLIN + rng.normal(0, 0.025, 3)) * strength_h
    density_e = (_EOSIN + rng.normal(0, 0.025, 3)) * strength_e
    white = 243 + rng.uniform(-3, 3) + rng.uniform(-1.5, 1.5, 3)
    height, width = section.eosin.shape
    haematoxylin = cv2.GaussianBlur(section.haematoxylin, (0, 0), 0.7)
    # The same sensor noise everywhere, one patch of it repeated.
    sensor = np.tile(rng.normal(0, 1.6, (256, 256)).astype(np.float32), (height // 256 + 1, width // 256 + 1))
    sensor = sensor[:height, :width]
    rgb = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        density = cv2.addWeighted(haematoxylin, -density_h[channel], section.eosin, -density_e[channel], 0)
        light = cv2.exp(density)
        rgb[..., channel] = cv2.scaleAdd(light, white[channel], sensor).clip(0, 255)
    return rgb


def _draw_pen(rng: Generator, rgb: NDArray[np.uint8], tissue: Mask) -> None:
    """A marker stroke, part beside the tissue and part over it."""
    height, width = rgb.shape[:2]
    rows, columns = np.nonzero(tissue)
    outward = rng.choice((-1, 1))
    edge = columns.max() if outward > 0 else columns.min()
    middle = COARSE * np.array([edge - 10 * outward, rows[columns == edge].mean()])
    lean = np.array([outward * rng.uniform(5, 25), rng.choice((-60.0, 60.0))])
    steps = np.cumsum(rng.normal(0, 18, (16, 2)) + lean, axis=0)
    path = np.clip(middle + steps - steps.mean(0) / 2, 30, (width - 30, height - 30))
    stroke = np.zeros((height // 2, width // 2), np.uint8)
    cv2.polylines(stroke, [_fixed(path / 2)], False, 255, int(rng.integers(14, 22)), cv2.LINE_AA, 4)
    top, bottom = (int(edge) // 2 * 2 for edge in (path[:, 1].min() - 30, path[:, 1].max() + 30))
    band = slice(max(0, top), min(bottom, height))
    soft = cv2.blur(stroke, (5, 5))[band.start // 2 : band.stop // 2]
    alpha = 0.82 * _grow(soft, width, band.stop - band.start)[..., None]
    colour = np.array(_PENS[rng.integers(len(_PENS))], np.float32)
    rgb[band] = (rgb[band] * (1 - alpha) + colour * alpha).astype(np.uint8)
