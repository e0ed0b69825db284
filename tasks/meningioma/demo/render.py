"""T1-weighted intensities after contrast agent, drawn tissue by tissue from signed distances.

Units: 1 is the fat of the scalp. Fluid and bone are dark, white matter is brighter than grey matter, and what has no
blood-brain barrier enhances: venous sinuses, choroid plexus, pituitary, mucosa, dura and the tumours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter, label

from tasks.meningioma.demo import anatomy as parts
from tasks.meningioma.demo.anatomy import Anatomy
from tasks.meningioma.demo.fields import Floats, capsule, cover, ellipsoid, mirrored, sheet
from tasks.meningioma.demo.tumours import Tumour

_AIR, _BONE, _MARROW, _FLUID = 0.015, 0.07, 0.34, 0.12
_GREY, _WHITE, _MUSCLE, _FAT, _SKIN = 0.32, 0.43, 0.34, 0.95, 0.50
_DURA, _BLOOD, _PLEXUS, _MUCOSA = 0.50, 0.86, 0.70, 0.62
_UPTAKE = {"bright": 0.80, "heterogeneous": 0.74, "faint": 0.53, "calcified": 0.70}


@dataclass(frozen=True)
class Head:
    """A head on a grid.

    Attributes:
        image: (X, Y, Z) float32, before the scanner's bias field and noise.
        tumours: (X, Y, Z) uint8, i + 1 in tumour i and 0 elsewhere.
        dura: (X, Y, Z) float32, distance to the nearest dura, millimetres.
    """

    image: Floats
    tumours: NDArray[np.uint8]
    dura: Floats


def draw_head(
    points: Floats, shape: tuple[int, int, int], spacing: ArrayLike, patient: Anatomy, tumours: Sequence[Tumour]
) -> Head:
    """The head of ``patient`` with ``tumours``.

    Args:
        points: (3, X * Y * Z) the voxels' centres, millimetres right, anterior and superior of the head's centre.
        spacing: (3,) sides of a voxel, millimetres.
    """
    volume = float(np.prod(np.asarray(spacing, float)))
    width = volume ** (1 / 3)
    where = patient.to_average(points)
    outside = parts.skin(where, patient.skull, patient.scalp)
    inner = parts.cavity(where)
    image = np.full(points.shape[1], _AIR, np.float32)
    near_skin = np.flatnonzero((outside < width) & (inner > -width))
    image[near_skin] = _outer(where[:, near_skin], outside[near_skin], inner[near_skin], patient, width)

    brain = np.flatnonzero(inner < width)
    spots = where[:, brain]
    labels = np.zeros(points.shape[1], np.uint8)
    grown = [_grow(tumour, spots, brain, labels, shape, volume / 1000, i + 1) for i, tumour in enumerate(tumours)]
    content = _brain(spots, inner[brain], patient, tumours, grown, width)
    inside = cover(inner[brain], width)
    image[brain] = image[brain] * (1 - inside) + content * inside
    strength = 0.55 + 0.25 * patient.texture(spots * np.float32(0.3))
    image[brain] = _over(image[brain], _DURA, np.clip(strength, 0.2, 1) * sheet(inner[brain], 1.2, width))
    image[brain] = _over(image[brain], _BLOOD, parts.sinuses(spots, width))
    distance = np.full(points.shape[1], np.inf, np.float32)
    distance[brain] = parts.dura(spots)
    return Head(image.reshape(shape), labels.reshape(shape), distance.reshape(shape))


def _over(image: Floats, level: float | Floats, share: Floats) -> Floats:
    """Paint ``level`` over ``share`` of each voxel."""
    return image + (np.float32(level) - image) * share


def _outer(points: Floats, outside: Floats, inner: Floats, patient: Anatomy, width: float) -> Floats:
    """Skin, fat, muscle, bone, orbits and airways."""
    both = mirrored(points)
    grain = patient.texture(points)
    image = _MUSCLE + np.float32(0.10) * np.clip(grain, -2, 2) + np.float32(0.30) * np.maximum(grain - 0.8, 0)
    fat = cover(
        -outside - (patient.scalp - 1.2) * (1 + np.float32(0.25) * patient.texture(points * np.float32(0.4))), width
    )
    image = _over(image, _FAT + np.float32(0.05) * grain, fat)
    # Bone: the vault has marrow between its tables; the base is thick and mottled with air.
    base = np.clip((-12 - points[2]) / 12, 0, 1)
    thickness = patient.skull * (
        1 + np.float32(0.15) * patient.texture(points * np.float32(0.25)) + np.float32(0.6) * base
    )
    bone = cover(inner - thickness, width) * cover(-inner, width)
    image = _over(image, _BONE, bone)
    image = _over(
        image, 0.45, 0.6 * base * bone * np.clip(0.5 + 0.6 * grain, 0, 1)
    )  # marrow of clivus and petrous bone
    image = _over(image, _MARROW, 0.75 * sheet(inner - thickness * np.float32(0.55), 2.2, width) * bone)
    jaw = np.minimum(capsule(both, (44, 22, -92), (16, 84, -104), 6), capsule(both, (46, 14, -50), (44, 20, -92), 5))
    image = _over(image, _BONE + 0.5 * _MARROW, cover(jaw, width))
    image = _airways(image, points, both, grain, width)
    image = _orbits(image, both, width)
    return _over(_over(image, _SKIN, sheet(outside + 0.8, 1.6, width)), _AIR, cover(-outside, width))


def _airways(image: Floats, points: Floats, both: Floats, grain: Floats, width: float) -> Floats:
    """Air in nose, sinuses, pharynx, mouth and ears, with the mucosa that lines it."""
    nose = ellipsoid(points, (0, 72, -58), (13, 26, 22))
    air = np.minimum(nose, ellipsoid(both, (29, 68, -60), (13, 15, 15)))
    air = np.minimum(air, ellipsoid(points, (0, 30, -42), (12, 12, 9)))
    air = np.minimum(air, ellipsoid(both, (11, 86, -16), (13, 5, 9)))
    air = np.minimum(air, capsule(points, (0, 20, -64), (0, 4, -140), 7))
    image = _over(_over(image, _AIR, cover(air, width)), _MUCOSA, sheet(air, 1.6, width))
    turbinates = np.abs(np.sin(both[0] * np.float32(2 * np.pi / 9))) * cover(nose, width)
    image = _over(image, _MUCOSA, 0.7 * turbinates)
    tongue = ellipsoid(points, (0, 58, -96), (24, 30, 15))
    image = _over(image, 0.42, cover(tongue, width))
    cells = cover(ellipsoid(both, (55, -22, -44), (11, 17, 15)), width)
    return _over(image, 0.05, cells * np.clip(0.75 + 0.3 * grain, 0, 1))


def _orbits(image: Floats, both: Floats, width: float) -> Floats:
    """Fat, eye, lens, optic nerve and the muscles beside it."""
    image = _over(image, _FAT, cover(ellipsoid(both, (29, 64, -27), (18, 24, 16)), width))
    image = _over(image, _MUSCLE + 0.2, sheet(capsule(both, (22, 40, -26), (42, 68, -26), 0), 4.0, width))
    image = _over(image, _MUSCLE + 0.2, sheet(capsule(both, (14, 40, -26), (18, 74, -26), 0), 4.0, width))
    image = _over(image, _GREY, sheet(capsule(both, (12, 34, -25), (30, 70, -27), 0), 3.5, width))
    eye = ellipsoid(both, (31, 78, -27), (12.2, 12.2, 12.2))
    image = _over(_over(image, _FLUID, cover(eye, width)), 0.55, sheet(eye, 1.2, width))
    return _over(image, 0.30, cover(ellipsoid(both, (31, 87, -27), (5, 2.2, 5)), width))


def _brain(
    points: Floats, inner: Floats, patient: Anatomy, tumours: Sequence[Tumour], grown: list[_Grown], width: float
) -> Floats:
    """What is inside the skull, pushed aside by the tumours."""
    pushed = points
    for tumour, growth in zip(tumours, grown, strict=True):
        pushed = _push(pushed, tumour, growth)
    wall = parts.cavity(pushed) if tumours else inner
    _, falx = parts.falx(pushed)
    height, tent = parts.tentorium(pushed)
    edge = np.minimum(-wall - patient.gap, np.minimum(falx - 1.2, tent - 1.2))
    edge = np.minimum(edge, parts.sylvian(pushed) - 1.2)
    stem = parts.brainstem(pushed)
    below = (height < 0) & (pushed[1] < -16) & (stem > 0)
    depth = 12 + 5 * patient.texture(pushed * np.float32(0.25))
    folds = np.hypot(patient.fold_distance(pushed), np.maximum(edge - depth, 0)) - np.float32(0.1 + 0.24 * patient.gap)
    folds = np.where(below, 9.0, folds)
    pia = np.minimum(edge, folds)
    pia = np.where((pushed[2] < -18) & (stem < 6) & ~below, np.minimum(edge, -stem), pia)  # cisterns round the stem

    image = np.full(points.shape[1], _WHITE, np.float32)
    for tumour, growth in zip(tumours, grown, strict=True):
        if tumour.oedema:  # swollen white matter is a little darker
            image = _over(image, 0.30, 0.7 * np.clip(1 - (growth.reach - growth.radius) / tumour.oedema, 0, 1))
    ribbon = np.where(below, _folia(pushed, edge), cover(pia - 3.4, width))
    image = _over(image, _GREY, ribbon)
    image = _over(image, _GREY + 0.02, cover(parts.deep_grey(pushed), width) * np.float32(0.8))
    image = _over(image, _FLUID, cover(pia - 0.2, width))
    image = _over(image, _WHITE - 0.03, cover(stem, width))
    wells, plexus = parts.ventricles(pushed, patient.ventricles)
    image = _over(image, _FLUID, cover(wells, width))
    image = _over(image, _PLEXUS, 0.8 * cover(plexus, width))
    image = _over(image, _BLOOD, _vessels(pushed, pia, patient, width))
    image = _over(image, _DURA + 0.08, np.float32(0.9) * np.maximum(sheet(falx, 1.3, width), sheet(tent, 1.1, width)))
    for tumour, growth in zip(tumours, grown, strict=True):
        image = _tumour(image, points, inner, tumour, growth, width)
    return image


def _folia(points: Floats, edge: Floats) -> Floats:
    """Grey matter of the cerebellum: thin leaves, and a white core."""
    leaves = 0.5 + 0.5 * np.sin(2 * np.pi * (points[2] + np.float32(0.35) * points[1]) / np.float32(7.5))
    share = np.clip((14 - edge) / 6, 0, 1) * np.clip(0.45 + 0.55 * leaves, 0, 1)
    return np.asarray(share, np.float32)


def _vessels(points: Floats, pia: Floats, patient: Anatomy, width: float) -> Floats:
    """Veins and arteries on the surface and in the folds: thin tubes where two random surfaces cross."""
    across = np.hypot(*(field(points) for field in patient.vessels)) * np.float32(11)
    return sheet(across, 1.9, width) * np.exp(
        -np.square(np.minimum(pia - 0.5, 0) / 3) - np.square(np.maximum(pia, 0) / 2)
    )


@dataclass(frozen=True)
class _Grown:
    """A tumour on a grid: ``reach`` (n,) is the radius at which it takes each point; it has grown to ``radius``."""

    reach: Floats
    radius: float


def _grow(
    tumour: Tumour,
    points: Floats,
    index: NDArray[np.intp],
    labels: NDArray[np.uint8],
    shape: tuple[int, int, int],
    voxel_ml: float,
    number: int,
) -> _Grown:
    """Let the tumour take the voxels it reaches first until its volume is met, and write its ``number`` there."""
    reach = tumour.radius_at(points)
    reach[labels[index] > 0] = np.inf
    count = max(1, round(tumour.volume_ml / voxel_ml))
    order = np.partition(reach, (count - 1, count))
    radius = float(order[count - 1] + order[count]) / 2
    taken = np.zeros(len(labels), bool)
    taken[index[reach < radius]] = True
    pieces, number_of_pieces = label(taken.reshape(shape))
    if number_of_pieces > 1:  # a crumb behind a fold of the skull's base
        largest = np.bincount(pieces.ravel())[1:].argmax() + 1
        taken = (pieces == largest).ravel()
    labels[taken] = number
    return _Grown(reach, radius)


def _push(points: Floats, tumour: Tumour, growth: _Grown) -> Floats:
    """Where the tissue at each point was before the tumour pushed it away, as if it kept its volume."""
    size = growth.radius * 1.12
    centre = (
        np.asarray(tumour.anchor, np.float32)[:, None] + np.float32(0.45 * growth.radius) * tumour.frame[0][:, None]
    )
    offset = points - centre
    distance = np.sqrt(np.square(offset).sum(axis=0))
    share = np.cbrt(np.clip(1 - (size / np.maximum(distance, size)) ** 3, 0, 1))
    fading = np.clip((distance - size) / (2.5 * size), 0, 1)
    return np.asarray(centre + offset * np.maximum(share, fading))


def _tumour(image: Floats, points: Floats, inner: Floats, tumour: Tumour, growth: _Grown, width: float) -> Floats:
    """The tumour with its rim of fluid and its dural tail."""
    edge = growth.reach - growth.radius
    edge = np.where(np.isfinite(edge), edge, 1e3).astype(np.float32)
    image = _over(image, _FLUID, 0.6 * sheet(edge - 1.6, 1.6, width) * cover(inner + 4, width))
    if tumour.tail:
        share = np.clip(1 - edge / tumour.tail, 0, 1)
        image = _over(image, 0.75, share * sheet(np.minimum(parts.dura(points), 50), 2.4, width))
    grain = tumour.lumps(points * np.float32(1.7))
    level = _UPTAKE[tumour.look] + np.float32(0.035) * grain
    if tumour.look == "heterogeneous":
        level = level - np.float32(0.40) * np.clip(grain - 0.3, 0, 1) * np.clip(-edge / 3, 0, 1)
    if tumour.look == "calcified":
        level = level - np.float32(0.55) * np.clip(2 * (grain - 0.8), 0, 1)
    return _over(image, level, cover(edge, width))


def scan(image: Floats, rng: Generator, noise: float, bias: float, blur: float) -> Floats:
    """What the scanner makes of it: blur, uneven coils, Rician noise.

    Args:
        noise: deviation in each of the two channels, in units of the scalp's fat.
        bias: how much the brightness varies over the head, one deviation.
        blur: deviation of the point spread, voxels.
    """
    image = gaussian_filter(image, blur) if blur else image
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in image.shape), indexing="ij")
    weights = rng.normal(0, 1, 9).astype(np.float32)
    terms = [*axes, *(a * a for a in axes), axes[0] * axes[1], axes[1] * axes[2], axes[0] * axes[2]]
    field = np.asarray(sum(w * t for w, t in zip(weights, terms, strict=True)))
    image = image * np.exp(np.float32(bias) * (field - field.mean()) / np.float32(field.std() + 1e-6))
    real, other = rng.standard_normal((2, *image.shape), np.float32) * np.float32(noise)
    return np.hypot(image + real, other)
