"""Where things are in a head: skin, skull, dura, falx, tentorium and ventricles as signed distances in millimetres.

The measures are those of an average adult, rounded; each patient is a stretched and gently warped copy with folds of
the cortex of its own. Axes: right, anterior, superior; the origin lies between the foramina of Monro.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from tasks.meningioma.demo.fields import Floats, SmoothField, capsule, common, ellipsoid, mirrored, sheet, union

_WARP = 2.5  # millimetres by which a patient's head differs from the average, one deviation
_BRAIN_AXES = (66.0, 84.0, 60.0)
_BRAIN_CENTRE = (0.0, -2.0, 12.0)


@dataclass(frozen=True)
class Anatomy:
    """One patient's head.

    Attributes:
        stretch: (3,) size along each axis, 1 on average.
        skull, scalp: thickness, millimetres.
        gap: width of the fluid between brain and dura, millimetres; wide in the old.
        ventricles: size of the ventricles, 1 on average.
        warp, folds, vessels, texture: the patient's own random fields.
        folds_slope: steepness of ``folds``, so that a distance to a fold can be told.
    """

    stretch: tuple[float, float, float]
    skull: float
    scalp: float
    gap: float
    ventricles: float
    warp: tuple[SmoothField, SmoothField, SmoothField]
    folds: SmoothField
    folds_slope: SmoothField
    vessels: tuple[SmoothField, SmoothField]
    texture: SmoothField

    @classmethod
    def draw(cls, rng: Generator) -> Anatomy:
        """A patient at random."""
        size = rng.uniform(0.95, 1.03)
        a, b, c = size * rng.uniform(0.97, 1.03, 3)
        folds = SmoothField.draw(rng, 12.0)
        return cls(
            stretch=(float(a), float(b), float(c)),
            skull=float(rng.uniform(6.0, 8.5)),
            scalp=float(rng.uniform(4.5, 7.5)),
            gap=float(rng.uniform(1.4, 3.2)),
            ventricles=float(rng.uniform(0.85, 1.35)),
            warp=(SmoothField.draw(rng, 60.0), SmoothField.draw(rng, 60.0), SmoothField.draw(rng, 60.0)),
            folds=folds,
            folds_slope=folds.slope(),
            vessels=(SmoothField.draw(rng, 24.0), SmoothField.draw(rng, 24.0)),
            texture=SmoothField.draw(rng, 9.0),
        )

    def to_average(self, points: Floats) -> Floats:
        """Points of this patient (3, n) laid on the average head."""
        shift = np.stack([field(points) for field in self.warp])
        return np.asarray(points / np.asarray(self.stretch, np.float32)[:, None] + np.float32(_WARP) * shift)

    def fold_distance(self, points: Floats) -> Floats:
        """Distance to the nearest fold between gyri; folds run inwards from the surface of the brain."""
        offset = points - np.asarray(_BRAIN_CENTRE, np.float32)[:, None]
        k = np.sqrt(np.square(offset / np.asarray(_BRAIN_AXES, np.float32)[:, None]).sum(axis=0))
        k = np.maximum(k, 0.25) ** np.float32(0.75)
        on_surface = offset / k
        return np.asarray(np.abs(self.folds(on_surface)) / np.maximum(self.folds_slope(on_surface), 0.08) * k)


def cavity(points: Floats) -> Floats:
    """Distance to the inner table of the skull: cerebrum, temporal lobes, posterior fossa and the canal below."""
    brain = common(ellipsoid(points, _BRAIN_CENTRE, _BRAIN_AXES), -20 - points[2], 14)
    temporal = ellipsoid(mirrored(points), (38, 4, -21), (27, 38, 23))
    posterior = ellipsoid(points, (0, -42, -27), (53, 42, 36))
    canal = capsule(points, (0, -18, -30), (0, -38, -140), 15)
    return union(union(brain, temporal, 10), union(posterior, canal, 8), 10)


def skin(points: Floats, skull: float, scalp: float) -> Floats:
    """Distance to the outside of the head."""
    both = mirrored(points)
    grown = skull + scalp
    vault = ellipsoid(points, (0, -2, 11), (66 + grown, 84 + grown, 61 + grown))
    face = ellipsoid(points, (0, 44, -66), (56, 50, 68))
    temporal = ellipsoid(both, (38, 4, -21), (26 + grown, 37 + grown, 22 + grown))
    occiput = ellipsoid(points, (0, -42, -27), (52 + grown, 41 + grown, 35 + grown))
    neck = capsule(points, (0, -40, -60), (0, -52, -170), 56)
    nose = ellipsoid(points, (0, 99, -58), (12, 15, 19))
    ears = ellipsoid(both, (78, -12, -40), (9, 15, 24))
    head = union(union(vault, temporal, 10), occiput, 10)
    return union(union(union(union(head, face, 24), neck, 30), nose, 10), ears, 5)


def falx(points: Floats) -> tuple[Floats, Floats]:
    """Signed distance to the mid-plane, and distance to the falx itself, which ends above the corpus callosum."""
    core = ellipsoid(points, (0, -2, 4), (60, 58, 31))
    beyond = np.maximum(np.maximum(-core, -18 - points[2]), 0)
    return points[0], np.hypot(points[0], beyond)


def tentorium(points: Floats) -> tuple[Floats, Floats]:
    """Signed height above the tentorium's surface, and distance to the tentorium itself."""
    x, y, z = points
    height = (z - (3 - np.float32(0.30) * np.abs(x) + np.float32(0.22) * (y + 30))) * np.float32(0.93)
    opening = 19 - np.hypot(x, (y + 18) * np.float32(0.7))  # the incisura, through which the brainstem passes
    beyond = np.maximum(np.maximum(opening, y + 10), 0)
    return height, np.hypot(height, beyond)


def dura(points: Floats) -> Floats:
    """Distance, not signed, to the nearest dura: the inner table of the skull, the falx or the tentorium."""
    return np.minimum(np.abs(cavity(points)), np.minimum(falx(points)[1], tentorium(points)[1]))


def sylvian(points: Floats) -> Floats:
    """Distance to the Sylvian fissure between the temporal lobe and the lobes above."""
    x, y, z = points
    rise = z - (-9 - np.float32(0.35) * (y - 20)) - 3 * np.sin(y / np.float32(9))
    out = np.maximum(np.maximum(34 - np.abs(x), np.maximum(y - 34, -28 - y)), 0)
    return np.hypot(rise * np.float32(0.94), out)


def ventricles(points: Floats, size: float) -> tuple[Floats, Floats]:
    """Distance to the ventricles, and to the choroid plexus in them."""
    both = mirrored(points)
    wide, tall = 6.5 * size, 7.5 * size
    body = capsule(both, (9 + 2 * size, 26, 13), (12 + 2 * size, -16, 22), 5.2 * size)
    atrium = ellipsoid(both, (23 + size, -33, 12), (wide, 15, tall))
    horn = capsule(both, (25, -36, 8), (35, -10, -18), 3.2 * size)
    third = ellipsoid(points, (0, -8, 3), (2.2 * size, 13, 9))
    fourth = ellipsoid(points, (0, -41, -31), (7, 5 * size, 10))
    lateral = union(union(body, atrium, 6), horn, 4)
    plexus = union(capsule(both, (22, -32, 10), (14, -14, 20), 2.0), ellipsoid(both, (23, -32, 10), (3.6, 7, 4)), 2)
    return np.minimum(lateral, np.minimum(third, fourth)), plexus


def deep_grey(points: Floats) -> Floats:
    """Distance to caudate, lentiform nucleus and thalamus."""
    both = mirrored(points)
    caudate = ellipsoid(both, (16, 19, 11), (5, 12, 8))
    lentiform = ellipsoid(both, (27, 4, 2), (7, 17, 9))
    thalamus = ellipsoid(both, (11.5, -13, 6), (8.5, 14, 9))
    return np.minimum(caudate, np.minimum(lentiform, thalamus))


def brainstem(points: Floats) -> Floats:
    """Distance to midbrain, pons and medulla."""
    pons = ellipsoid(points, (0, -20, -30), (15, 12, 15))
    stem = capsule(points, (0, -14, -6), (0, -34, -130), 9.5)
    return union(pons, stem, 8)


def sinuses(points: Floats, width: float) -> Floats:
    """Share of a voxel that venous sinuses, pituitary and large vessels take, all of which enhance."""
    both = mirrored(points)
    wall = cavity(points)
    sagittal = np.hypot(points[0], wall + 2.5) - np.where((points[2] > 0) & (points[1] < 70), 2.9, -9)
    height, _ = tentorium(points)
    lateral = np.hypot(wall + 2.0, height) - np.where((points[1] < -30) & (np.abs(points[0]) > 3), 3.4, -9)
    sigmoid = capsule(both, (50, -42, -22), (36, -38, -58), 3.4)
    straight = capsule(points, (0, -34, 3), (0, -78, -9), 2.0)
    cavernous = ellipsoid(both, (13, 10, -29), (5, 10, 5))
    pituitary = ellipsoid(points, (0, 10, -29), (6, 4.5, 4))
    shape = np.minimum(np.minimum(sagittal, lateral), np.minimum(sigmoid, straight))
    shape = np.minimum(shape, np.minimum(cavernous, pituitary))
    arteries = np.minimum(
        capsule(both, (3, 14, -22), (34, 12, -14), 0.0), capsule(points, (0, -6, -14), (0, -10, -45), 0)
    )
    return np.maximum(np.clip(0.5 - shape / np.float32(width), 0, 1), sheet(arteries, 2.6, width))
