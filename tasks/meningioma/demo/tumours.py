"""Meningiomas: blobs with a broad base on the dura, of a volume that is met to the voxel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from tasks.meningioma.demo.anatomy import cavity, falx, tentorium
from tasks.meningioma.demo.fields import Floats, SmoothField

SITES = ("convexity", "falx", "sphenoid wing", "parasagittal", "olfactory groove", "petrous", "tentorium")
LOOKS = ("bright", "heterogeneous", "bright", "faint", "calcified")
SMALLEST_ML, LARGEST_ML = 0.3, 30.0
_INSET = 0.45  # of the radius, from the dura to the blob's centre
_CANDIDATES = 6000
Surface = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Tumour:
    """One meningioma, the same on any grid.

    Attributes:
        site: one of ``SITES``.
        look: one of ``LOOKS``, how it takes up contrast agent.
        volume_ml: volume of its label.
        anchor: (3,) the middle of its base, a point of the dura.
        frame: (3, 3) rows are the inward normal and two directions along the dura.
        flatness: its width along the dura over its height.
        tail: length of the dural tail, millimetres; 0 for none. The tail is drawn and is no part of the label.
        oedema: width of the swollen white matter around it, millimetres; 0 for none.
        lumps: random field of its surface and of its uptake.
    """

    site: str
    look: str
    volume_ml: float
    anchor: tuple[float, float, float]
    frame: NDArray[np.float32]
    flatness: float
    tail: float
    oedema: float
    lumps: SmoothField

    @classmethod
    def draw(cls, rng: Generator, site: str, look: str, volume_ml: float, away_from: tuple[Tumour, ...]) -> Tumour:
        """A tumour at ``site``, as far from the others as the site allows."""
        anchor, normal = _anchor(rng, site, away_from)
        small = volume_ml < 2
        return cls(
            site=site,
            look=look,
            volume_ml=volume_ml,
            anchor=(float(anchor[0]), float(anchor[1]), float(anchor[2])),
            frame=_frame(normal, rng),
            flatness=float(rng.uniform(1.0, 1.5)),
            tail=float(rng.uniform(7, 16)) if rng.random() < 0.5 else 0.0,
            oedema=0.0 if small or rng.random() < 0.5 else float(rng.uniform(4, 12)),
            lumps=SmoothField.draw(rng, 13.0),
        )

    def radius_at(self, points: Floats) -> Floats:
        """The radius (n,) at which the growing tumour reaches each point, millimetres; infinite where it cannot grow.

        A ball of radius r around the point ``_INSET * r`` above the anchor reaches p when
        (1 - i^2) r^2 + 2 i h r - d^2 >= 0 with h the height of p above the dura and d its distance from the anchor.
        """
        offset = np.einsum("rc,cn->rn", self.frame, points - np.asarray(self.anchor, np.float32)[:, None])
        offset[1:] /= np.float32(self.flatness)
        height, distance_2 = offset[0], np.square(offset).sum(axis=0)
        rest = np.float32(1 - _INSET**2)
        radius = (np.sqrt(np.square(_INSET * height) + rest * distance_2) - np.float32(_INSET) * height) / rest
        radius = radius * (1 + np.float32(0.10) * np.clip(self.lumps(points), -2, 2))
        return np.asarray(np.where(self._may_grow(points), radius, np.float32(np.inf)))

    def _may_grow(self, points: Floats) -> NDArray[np.bool_]:
        """Inside the skull, on the anchor's side of falx and tentorium where they are."""
        inside = cavity(points) < 0
        for surface in (falx, tentorium):
            signed, distance = surface(points)
            (own,), _ = surface(self._above())
            around = np.square(distance) - np.square(signed) > 1  # a millimetre past the edge of the sheet
            inside &= (np.sign(signed) == np.sign(own)) | around
        return inside

    def _above(self) -> Floats:
        """(3, 1) a point just inside the tumour, which tells its side of falx and tentorium."""
        return (np.asarray(self.anchor, np.float32) + 2 * self.frame[0])[:, None]


def _anchor(rng: Generator, site: str, away_from: tuple[Tumour, ...]) -> tuple[Floats, Floats]:
    """A point of the dura at ``site`` and the normal there that points to the brain."""
    surface, low, high, outer = _REGIONS[site]
    points = rng.uniform(low, high, (_CANDIDATES, 3)).astype(np.float32).T
    points[0] *= rng.choice([-1, 1])
    for _ in range(4):  # Newton's steps on to the surface
        normal = _gradient(surface, points)
        points = points - surface(points)[None] * normal
    inside = (np.abs(points[0]) >= low[0] - 4) & (points[1] >= low[1] - 4) & (points[1] <= high[1] + 4)
    inside &= (points[2] >= low[2] - 4) & (points[2] <= high[2] + 4) & (np.abs(surface(points)) < 0.2)
    if not outer:
        inside &= cavity(points) < -8
    points = points[:, inside]
    assert points.size, f"no dura at the {site}"
    choice = points[:, :1]
    if away_from:
        others = np.asarray([t.anchor for t in away_from], np.float32)
        choice = points[:, [np.linalg.norm(points.T[:, None] - others, axis=2).min(axis=1).argmax()]]
    normal = _gradient(surface, choice)[:, 0]
    inward = -normal if outer else normal * rng.choice([-1, 1])
    return choice[:, 0], np.asarray(inward, np.float32)


def _midplane(points: Floats) -> Floats:
    return falx(points)[0]


def _tent(points: Floats) -> Floats:
    return tentorium(points)[0]


# Surface, box of the right half (millimetres, low and high corner), and whether it is the inner table of the skull.
_REGIONS = {
    "convexity": (cavity, (25, -70, 18), (66, 62, 60), True),
    "parasagittal": (cavity, (9, -60, 40), (24, 55, 76), True),
    "sphenoid wing": (cavity, (30, 22, -34), (56, 44, -8), True),
    "olfactory groove": (cavity, (3, 28, -34), (16, 58, -8), True),
    "petrous": (cavity, (24, -40, -52), (48, -12, -26), True),
    "falx": (_midplane, (0, -55, 42), (1, 50, 58), False),
    "tentorium": (_tent, (18, -62, -22), (40, -34, 4), False),
}


def _gradient(surface: Surface, points: Floats) -> Floats:
    """Unit gradient (3, n) by central differences of half a millimetre."""
    steps = np.eye(3, dtype=np.float32)[:, :, None] * np.float32(0.5)
    rise = np.stack([surface(points + s) - surface(points - s) for s in steps])
    return np.asarray(rise / np.maximum(np.linalg.norm(rise, axis=0), 1e-6))


def _frame(normal: Floats, rng: Generator) -> NDArray[np.float32]:
    """Rows: the normal and two directions at right angles to it, turned at random."""
    basis, _ = np.linalg.qr(np.stack([normal, *rng.standard_normal((2, 3))]).T)
    frame = basis.T
    return np.asarray(frame * np.sign(frame[0] @ normal) if frame[0] @ normal < 0 else frame, np.float32)
