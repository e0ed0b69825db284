"""Pictures of four tissues as haematoxylin and eosin would stain them, 64 pixels wide, from a seed.

The classes differ in what is where: fibres in one direction, rings of nuclei around a lumen, crowds of small round
nuclei, few large irregular ones. How strongly a picture is stained varies from patient to patient and more than between
the classes, so that its mean colour says little.
"""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from kernels.errors import InputError
from tasks.common.made_sets import made_once

log = logging.getLogger(__name__)

CLASSES = ("glands", "lymphocytes", "stroma", "tumour")
SIDE = 64
_SCALE = 2  # painted twice as large
_VERSION = 1  # raised whenever the same seed would give other pixels
_IMAGES_PER_PATIENT = 8
# Optical density per unit of stain for red, green, blue; after Ruifrok and Johnston, 2001, rounded.
_HAEMATOXYLIN = np.array([0.62, 0.72, 0.30])
_EOSIN = np.array([0.12, 0.92, 0.36])
Stain = NDArray[np.float32]


def make_images(folder: Path | None = None, count: int = 400, seed: int = 7) -> Path:
    """Make the images unless they are there, and give the CSV (path, label, patient) that lists them.

    A folder appears whole or not at all. Classes are of equal size to one; each patient has up to eight images.

    Raises:
        InputError: too few images, the folder holds something else, or it cannot be written.
    """
    if count < 8 * len(CLASSES):
        raise InputError(f"data.textures.images={count}: {8 * len(CLASSES)} images are needed at least.")
    wanted = {"images": count, "seed": seed, "version": _VERSION}
    place = made_once("textures", wanted, lambda empty: _write(empty, count, seed), folder, f"{count} images")
    return place / "images.csv"


def _write(folder: Path, count: int, seed: int) -> None:
    patients = -(-count // _IMAGES_PER_PATIENT)
    stains = np.random.default_rng([seed, 0]).uniform((0.7, 0.7), (1.5, 1.5), (patients, 2))
    rows = []
    for index in range(count):
        name, patient = CLASSES[index % len(CLASSES)], index // _IMAGES_PER_PATIENT
        pixels = paint(name, np.random.default_rng([seed, 1, index]), *stains[patient])
        path = folder / name / f"{index:04d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
        rows.append((path.relative_to(folder).as_posix(), name, f"patient_{patient:02d}"))
    with (folder / "images.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "patient"))
        writer.writerows(rows)


def paint(name: str, rng: Generator, blue: float = 1.0, pink: float = 1.0) -> NDArray[np.uint8]:
    """One picture (64, 64, 3) of the class ``name``, with ``blue`` times the haematoxylin and ``pink`` the eosin."""
    side = SIDE * _SCALE
    nuclei = np.zeros((side, side), np.float32)
    ground = 0.35 + 0.25 * _noise(rng, side, 10)
    blue, pink = blue * rng.uniform(0.75, 1.3), pink * rng.uniform(0.75, 1.3)
    _TISSUES[name](rng, nuclei, ground)
    nuclei = cv2.GaussianBlur(nuclei, (0, 0), 1.0) * (0.8 + 0.4 * _noise(rng, side, 3))
    density = nuclei[..., None] * _HAEMATOXYLIN * blue + ground[..., None] * _EOSIN * pink
    light = (255 * np.power(10.0, -0.8 * density)).astype(np.float32)
    small = cv2.resize(light, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), rng.uniform(0.4, 1.6))  # never all in focus
    small = small + rng.normal(0, 8, (SIDE, SIDE, 1))
    return np.clip(small.round(), 0, 255).astype(np.uint8)


def _glands(rng: Generator, nuclei: Stain, ground: Stain) -> None:
    """One or two rings of nuclei around an empty lumen."""
    for _ in range(rng.integers(1, 3)):
        x, y = rng.uniform(30, 98, 2)
        a, b = rng.uniform(20, 32), rng.uniform(16, 26)
        turn = rng.uniform(0, np.pi)
        cv2.ellipse(ground, _at(x, y), _at(0.6 * a, 0.6 * b), np.degrees(turn), 0, 360, 0.03, -1, cv2.LINE_AA)
        steps = int(rng.integers(14, 20))
        for angle in np.linspace(0, 2 * np.pi, steps, endpoint=False) + rng.normal(0, 0.06, steps):
            u, v = a * np.cos(angle), b * np.sin(angle)
            px, py = x + u * np.cos(turn) - v * np.sin(turn), y + u * np.sin(turn) + v * np.cos(turn)
            _nucleus(rng, nuclei, px, py, 3.6, 1.5, np.degrees(angle + turn))
    _scatter(rng, nuclei, int(rng.integers(4, 10)), 2.6, 1.8)


def _lymphocytes(rng: Generator, nuclei: Stain, ground: Stain) -> None:
    """A crowd of small round nuclei."""
    _scatter(rng, nuclei, int(rng.integers(22, 60)), 3.6, 1.1)


def _stroma(rng: Generator, nuclei: Stain, ground: Stain) -> None:
    """Wavy fibres in one direction, with thin nuclei along them."""
    side = len(ground)
    turn = rng.uniform(0, np.pi)
    yy, xx = np.mgrid[:side, :side].astype(np.float32)
    along = xx * np.cos(turn) + yy * np.sin(turn) + 14 * (_noise(rng, side, 24) - 0.5)
    ground += (0.14 * np.sin(2 * np.pi * along / rng.uniform(7, 12))).astype(np.float32)
    for _ in range(rng.integers(10, 26)):
        x, y = rng.uniform(0, side, 2)
        _nucleus(rng, nuclei, x, y, 5.0, 2.8, np.degrees(turn) + 90 + rng.normal(0, 14))


def _tumour(rng: Generator, nuclei: Stain, ground: Stain) -> None:
    """Large nuclei of uneven size and shape."""
    for _ in range(rng.integers(10, 26)):
        x, y = rng.uniform(0, len(ground), 2)
        _nucleus(rng, nuclei, x, y, rng.uniform(4.0, 8.5), rng.uniform(1.0, 1.6), rng.uniform(0, 180))


_TISSUES = {"glands": _glands, "lymphocytes": _lymphocytes, "stroma": _stroma, "tumour": _tumour}


def _scatter(rng: Generator, nuclei: Stain, count: int, radius: float, stretch: float) -> None:
    for x, y in rng.uniform(0, len(nuclei), (count, 2)):
        _nucleus(rng, nuclei, x, y, radius, stretch, rng.uniform(0, 180))


def _nucleus(rng: Generator, nuclei: Stain, x: float, y: float, radius: float, stretch: float, degrees: float) -> None:
    size = radius * rng.uniform(0.85, 1.15)
    axes = _at(size * np.sqrt(stretch), size / np.sqrt(stretch))
    cv2.ellipse(nuclei, _at(x, y), axes, float(degrees), 0, 360, float(rng.uniform(0.7, 1.1)), -1, cv2.LINE_AA)


def _noise(rng: Generator, side: int, grain: int) -> Stain:
    """Smooth noise in [0, 1] with patches of ``grain`` pixels."""
    coarse = rng.random((side // grain + 2, side // grain + 2)).astype(np.float32)
    return np.asarray(np.clip(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC), 0, 1))


def _at(x: float, y: float) -> tuple[int, int]:
    return round(float(x)), round(float(y))
