"""Retinas as a fundus camera sees them: a tree of vessels down to faint capillaries, disc, macula and lesions."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from tasks.qtseg.demo.noise import Field, Picture, coordinates, finished, smooth_noise, smoothstep

_FINE = 4  # vessels are drawn this much larger
_THINNEST = 0.6  # pixels; what is thinner is not drawn


def paint_vessels(rng: Generator, side: int, subject: Generator) -> Picture:
    """One eye; ``subject`` draws the colour of the fundus and on which side the disc lies."""
    yy, xx = coordinates(side)
    mirrored = subject.random() < 0.5
    disc = np.array([0.24 if not mirrored else 0.76, 0.5]) * side + rng.normal(0, 0.03 * side, 2)
    macula = np.array([0.60 if not mirrored else 0.40, 0.53]) * side + rng.normal(0, 0.02 * side, 2)
    image = _fundus(rng, subject, xx, yy, disc, macula, side)
    cover, width, inside = _tree(rng, side, disc, macula)
    contrast = 0.17 + 0.36 * smoothstep(width, 0.6, 2.6)
    contrast = contrast * (1 + 0.25 * smooth_noise(rng, side, side / 3)) * rng.uniform(0.75, 1.1)
    dark = np.array([0.42, 1.0, 0.75], np.float32) * (cover * contrast)[..., None]
    image *= np.clip(1 - dark, 0.05, 1)
    _findings(rng, image, side)
    centre = side / 2 + rng.normal(0, 0.01 * side, 2)
    radius = np.hypot(xx - centre[0], yy - centre[1])
    angle = rng.uniform(0, 2 * np.pi)
    slope = ((xx - side / 2) * np.cos(angle) + (yy - side / 2) * np.sin(angle)) / side
    image *= (1 + rng.uniform(0, 0.5) * slope - rng.uniform(0.1, 0.5) * np.square(radius / (side / 2)))[..., None]
    fov = radius < 0.485 * side
    image *= smoothstep(np.asarray(0.492 * side - radius, np.float32), 0, 0.015 * side)[..., None]
    pixels = finished(image, rng, rng.uniform(0.25, 0.55), rng.uniform(1.5, 4.5))
    return Picture(pixels, (inside & fov).astype(np.uint8) * 255, fov.astype(np.uint8) * 255)


def _fundus(
    rng: Generator, subject: Generator, xx: Field, yy: Field, disc: NDArray, macula: NDArray, side: int
) -> Field:
    tone = np.array([205, 104, 52], np.float32) * subject.uniform(0.75, 1.12) + subject.normal(0, 8, 3)
    choroid = 0.06 * smooth_noise(rng, side, side / 5, 3) + 0.05 * np.abs(smooth_noise(rng, side, side / 16))
    image = tone * (1 + choroid)[..., None]
    yellow = smoothstep(np.asarray(-np.hypot(xx - macula[0], yy - macula[1]), np.float32), -0.16 * side, 0)
    image = image * (1 - np.array([0.3, 0.42, 0.4]) * (yellow * rng.uniform(0.5, 1))[..., None])
    away = np.hypot((xx - disc[0]) * 1.1, yy - disc[1])
    size = rng.uniform(0.062, 0.085) * side
    bright = smoothstep(np.asarray(size - away, np.float32), -0.018 * side, 0.018 * side) * rng.uniform(0.65, 1)
    cup = smoothstep(np.asarray(0.5 * size - away, np.float32), -0.02 * side, 0.02 * side)
    image = image + (np.array([250, 205, 140]) - image) * bright[..., None] + cup[..., None] * np.array([4, 26, 44])
    return np.asarray(image, np.float32)


def _tree(rng: Generator, side: int, disc: NDArray, macula: NDArray) -> tuple[Field, Field, NDArray[np.bool_]]:
    """How much of each pixel is vessel, how wide the vessel there is in pixels, and what counts as vessel.

    All branches grow at once, one step at a time: each keeps a width, turns a little, is drawn towards an arc around
    the macula while it is thick, and now and then sends out a thinner one.
    """
    scale, step = side / 128, 0.012 * side
    toward = np.sign(macula[0] - disc[0])
    # Upper and lower arcades, artery and vein of each, and the smaller ones to the nose.
    headings = np.array([-1.25, -1.0, 1.0, 1.25, -2.3, 2.3, -0.35, 0.35]) + rng.normal(0, 0.12, 8)
    widths = np.array([2.3, 1.8, 1.8, 2.4, 1.4, 1.4, 0.9, 0.9]) * scale * rng.uniform(0.85, 1.15, 8)
    heading = np.where(toward > 0, headings, np.pi - headings)
    place = np.repeat(disc[None], 8, 0) + rng.normal(0, 0.012 * side, (8, 2))
    drift, since = rng.normal(0, 0.05, 8), rng.uniform(0, 6, 8)
    lines: list[tuple[NDArray, NDArray, NDArray]] = []
    for _ in range(110):
        alive = (widths > _THINNEST * scale) & (np.abs(place - side / 2).max(1) < 0.52 * side)
        place, heading, widths, drift, since = (a[alive] for a in (place, heading, widths, drift, since))
        if not len(place):
            break
        drift = 0.8 * drift + rng.normal(0, 0.026, len(place))
        to_macula = np.arctan2(macula[1] - place[:, 1], macula[0] - place[:, 0])
        near = np.hypot(*(macula - place).T) / side
        turn = np.sin(to_macula - heading)  # arcades bend around the macula, and nothing crosses it
        arcade = np.where(widths > 1.2 * scale, 0.042, 0.008)
        heading = heading + drift + np.where(near > 0.26, arcade, -0.22 * np.maximum(0, 1 - near / 0.2)) * turn
        ahead = place + step * np.stack([np.cos(heading), np.sin(heading)], 1)
        lines.append((place, ahead, widths))
        place, widths, since = ahead, widths * 0.993, since + 1
        forks = (rng.random(len(place)) < 0.02 + 0.004 * since) & (since > 4)
        if forks.any() and len(place) < 90:
            angle = rng.choice([-1, 1], forks.sum()) * rng.uniform(0.45, 1.1, forks.sum())
            share = rng.uniform(0.42, 0.85, forks.sum())
            young = widths[forks] * share
            widths = np.where(forks, widths * 0.93, widths)
            since = np.where(forks, 0, since)
            place, heading = np.concatenate([place, place[forks]]), np.concatenate([heading, heading[forks] + angle])
            widths, drift = np.concatenate([widths, young]), np.concatenate([drift, np.zeros(forks.sum())])
            since = np.concatenate([since, np.zeros(forks.sum())])
    return _drawn(lines, side)


def _drawn(lines: list[tuple[NDArray, NDArray, NDArray]], side: int) -> tuple[Field, Field, NDArray[np.bool_]]:
    """Segments (from, to, width in pixels), painted large and averaged down; thick ones are painted last."""
    starts, ends, widths = (np.concatenate(part) for part in zip(*lines, strict=True))
    large = np.zeros((side * _FINE, side * _FINE), np.float32)
    thick = np.maximum(1, np.rint(widths * _FINE)).astype(int)
    points = np.stack([starts, ends], 1) * _FINE
    for level in np.unique(thick).tolist():
        chosen = list(points[thick == level].round().astype(np.int32))
        cv2.polylines(large, chosen, False, float(level / _FINE), level)
    covered = cv2.resize((large > 0).astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    total = cv2.resize(large, (side, side), interpolation=cv2.INTER_AREA)
    width = np.where(covered > 0, total / np.maximum(covered, 1e-6), 0).astype(np.float32)
    return np.asarray(covered), width, covered >= 0.5


def _findings(rng: Generator, image: Field, side: int) -> None:
    """Bright exudates and dark bleedings, which are no vessels."""
    for colour, most in (((235, 205, 120), 9), ((96, 28, 18), 7)):
        layer = np.zeros((side * _FINE, side * _FINE), np.float32)
        for x, y in rng.uniform(0.15, 0.85, (int(rng.integers(0, most)), 2)) * len(layer):
            axes = [max(1, round(float(v))) for v in rng.uniform(0.5, 2.2, 2) * len(layer) / 128]
            angle = float(rng.uniform(0, 180))
            cv2.ellipse(layer, (round(float(x)), round(float(y))), axes, angle, 0, 360, 0.75, -1, cv2.LINE_AA)
        soft = cv2.GaussianBlur(cv2.resize(layer, (side, side), interpolation=cv2.INTER_AREA), (0, 0), 0.5)
        image += (np.array(colour, np.float32) - image) * soft[..., None]
