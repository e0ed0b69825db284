"""Making the demo's images once: a folder that appears whole, with a CSV that lists them."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from kernels.errors import InputError, unknown_name
from tasks.common.made_sets import made_once
from tasks.qtseg.demo.lesions import paint_lesion
from tasks.qtseg.demo.noise import Picture
from tasks.qtseg.demo.nuclei import paint_nuclei
from tasks.qtseg.demo.vessels import paint_vessels

log = logging.getLogger(__name__)

_PAINTERS: dict[str, tuple[Callable[[Generator, int, Generator], Picture], str]] = {
    "lesions": (paint_lesion, "lesion"),
    "nuclei": (paint_nuclei, "nucleus"),
    "vessels": (paint_vessels, "vessel"),
}
KINDS = (*_PAINTERS, "mix")
_VERSION = 1  # raised whenever the same seed would give other pixels
_FEWEST, _IMAGES_PER_PATIENT = 8, 2


def make_images(
    folder: Path | None = None, kind: str = "lesions", count: int = 160, side: int = 128, seed: int = 7
) -> Path:
    """Make the images unless they are there, and give the CSV (image, mask, patient, stratum, and fov for vessels).

    A folder appears whole or not at all. Each patient has two images.

    Args:
        kind: lesions, nuclei, vessels, or a mix of all three.

    Raises:
        InputError: an unknown kind, too few or too small images; the folder holds something else or cannot be written.
    """
    if kind not in KINDS:
        raise unknown_name("data.shapes2d.kind", kind, KINDS)
    if count < _FEWEST:
        raise InputError(f"data.shapes2d.images={count}: {_FEWEST} images are needed at least.")
    if not 48 <= side <= 1024:
        raise InputError(f"data.shapes2d.side={side} must be 48 to 1024 pixels.")
    wanted = {"kind": kind, "images": count, "side": side, "seed": seed, "version": _VERSION}
    place = made_once(
        "shapes2d", wanted, lambda empty: _write(empty, kind, count, side, seed), folder, f"{count} images"
    )
    return place / "images.csv"


def class_name(kind: str) -> str:
    """What the foreground of a kind is, such as ``lesion``."""
    return "structure" if kind == "mix" else _PAINTERS[kind][1]


def paint(kind: str, index: int, side: int = 128, seed: int = 7) -> Picture:
    """Picture number ``index`` of a kind (not ``mix``)."""
    painter, _ = _PAINTERS[kind]
    subject = np.random.default_rng([seed, 0, index // _IMAGES_PER_PATIENT])
    return painter(np.random.default_rng([seed, 1, index]), side, subject)


def _write(folder: Path, kind: str, count: int, side: int, seed: int) -> None:
    for name in ("images", "masks", "fov"):
        (folder / name).mkdir()
    rows = []
    for index in range(count):
        patient = index // _IMAGES_PER_PATIENT
        of = list(_PAINTERS)[patient % len(_PAINTERS)] if kind == "mix" else kind
        picture = paint(of, index, side, seed)
        fov = np.full((side, side), 255, np.uint8) if picture.fov is None else picture.fov
        name = f"{_PAINTERS[of][1]}_{index:03d}.png"
        planes: dict[str, NDArray[np.uint8]] = {"images": picture.image, "masks": picture.mask}
        for part, array in (planes | ({"fov": fov} if kind in ("vessels", "mix") else {})).items():
            Image.fromarray(array).save(folder / part / name)
        fov_path = f"fov/{name}" if kind in ("vessels", "mix") else ""
        rows.append((f"images/{name}", f"masks/{name}", fov_path, f"patient_{patient:02d}", of, Path(name).stem))
    with (folder / "images.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "mask", "fov", "patient", "stratum", "id"))
        writer.writerows(rows)
