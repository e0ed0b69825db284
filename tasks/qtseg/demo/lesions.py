"""Pictures as a dermatoscope takes them: a pigmented lesion on skin, under hair, bubbles and uneven light."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from tasks.qtseg.demo.noise import Field, Picture, coordinates, finished, smooth_noise, smoothstep

# Red, green, blue of skin and of the pigments that lesions have, from light to dark.
_SKINS = np.array([[232, 190, 172], [222, 168, 146], [205, 150, 126], [236, 202, 190], [184, 128, 104]], np.float32)
_PIGMENTS = np.array(
    [[176, 116, 84], [140, 84, 58], [104, 62, 46], [74, 46, 42], [150, 88, 92], [112, 102, 112]], np.float32
)


def paint_lesion(rng: Generator, side: int, subject: Generator) -> Picture:
    """One lesion; ``subject`` draws what a patient's images share, the skin."""
    scale = side / 128
    yy, xx = coordinates(side)
    skin = _SKINS[subject.integers(len(_SKINS))] * subject.uniform(0.9, 1.06) + subject.normal(0, 5, 3)
    image = np.broadcast_to(skin.astype(np.float32), (side, side, 3)).copy()
    texture = 3.0 * smooth_noise(rng, side, 14 * scale, 3) + 2.0 * smooth_noise(rng, side, 3 * scale)
    image += texture[..., None] * np.array([0.8, 1.0, 1.0], np.float32)
    flush = smoothstep(smooth_noise(rng, side, 45 * scale), 0.4, 2.0) * rng.uniform(0, 1)
    image -= flush[..., None] * np.array([4, 30, 26], np.float32)
    _furrows(rng, image, xx, yy, scale)

    inside, distance = _outline(rng, xx, yy, side)
    _freckles(rng, image, side, scale)
    softness = rng.uniform(0.8, 5.0) * scale
    cover = smoothstep(distance, -softness, softness)
    # Faint ones leave skin shining through, more in some parts than in others.
    strength = np.clip(rng.uniform(0.45, 1.0) + 0.12 * smooth_noise(rng, side, 24 * scale), 0.22, 1)
    pigment = _pigment(rng, side, scale, distance, xx, yy)
    image += (pigment - image) * (cover * strength)[..., None]

    image *= _light(rng, xx, yy, side)[..., None]
    _hairs(rng, image, side)
    _bubbles(rng, image, xx, yy, scale)
    if rng.random() < 0.25:
        _ruler(rng, image, side)
    if rng.random() < 0.3:
        radius = np.hypot(xx - side / 2, yy - side / 2) / side
        image *= (1 - 0.93 * smoothstep(radius, rng.uniform(0.52, 0.58), 0.64))[..., None]
    pixels = finished(image, rng, rng.uniform(0.3, 0.9) * scale, rng.uniform(1.5, 4.5))
    return Picture(pixels, inside.astype(np.uint8) * 255)


def _outline(rng: Generator, xx: Field, yy: Field, side: int) -> tuple[NDArray[np.bool_], Field]:
    """Inside (bool) and the distance to the outline, positive inside, in pixels."""
    size = side * float(np.exp(rng.uniform(np.log(0.11), np.log(0.34))))
    centre = side / 2 + rng.normal(0, 0.09 * side, 2)
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.6)
    warp = 0.10 * size
    dx = xx - centre[0] + warp * smooth_noise(rng, side, 0.5 * size + 4)
    dy = yy - centre[1] + warp * smooth_noise(rng, side, 0.5 * size + 4)
    u = (dx * np.cos(turn) + dy * np.sin(turn)) / np.sqrt(stretch)
    v = (-dx * np.sin(turn) + dy * np.cos(turn)) * np.sqrt(stretch)
    angle, order = np.arctan2(v, u), np.arange(2, 8)
    amplitude = rng.normal(0, 1, len(order)) * rng.uniform(0.05, 0.22) / order
    waves = amplitude * np.cos(order * angle[..., None] + rng.uniform(0, 2 * np.pi, len(order)))
    shape = (size * (1 + waves.sum(-1)) - np.hypot(u, v)).astype(np.float32)
    inside = (shape > 0).astype(np.uint8)
    inside |= cv2.morphologyEx(inside, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    into = cv2.distanceTransform(inside, cv2.DIST_L2, 5)
    out = cv2.distanceTransform(1 - inside, cv2.DIST_L2, 5)
    return inside.astype(bool), np.asarray(into - out, np.float32)


def _pigment(rng: Generator, side: int, scale: float, distance: Field, xx: Field, yy: Field) -> Field:
    """Colours of the lesion: two or three tones in patches, a network of lines or dots, a darker or lighter rim."""
    first, second, third = _PIGMENTS[rng.choice(len(_PIGMENTS), 3, replace=False, p=[0.24, 0.26, 0.2, 0.12, 0.1, 0.08])]
    patches = smoothstep(smooth_noise(rng, side, 22 * scale), -0.4, 0.8)[..., None]
    blotch = smoothstep(smooth_noise(rng, side, 16 * scale), 0.9, 1.6)[..., None] * rng.uniform(0, 1)
    colour = first + (second - first) * patches * rng.uniform(0.3, 1)
    colour = colour + (third - colour) * blotch
    style = rng.random()
    if style < 0.45:  # pigment network: dark lines around pale holes
        holes = np.abs(smooth_noise(rng, side, 5.5 * scale))
        colour = colour * (1 - rng.uniform(0.15, 0.35) * (1 - smoothstep(holes, 0.1, 0.5)))[..., None]
    elif style < 0.7:  # globules
        dots = smoothstep(smooth_noise(rng, side, 4.5 * scale), 1.1, 1.6)
        colour = colour * (1 - rng.uniform(0.2, 0.45) * dots)[..., None]
    rim = np.exp(-np.square(distance / (6 * scale)))
    return np.asarray(colour * (1 + rng.uniform(-0.2, 0.15) * rim)[..., None], np.float32)


def _furrows(rng: Generator, image: Field, xx: Field, yy: Field, scale: float) -> None:
    turn = rng.uniform(0, np.pi)
    for angle in (turn, turn + rng.uniform(0.8, 1.6)):
        along = xx * np.cos(angle) + yy * np.sin(angle) + 3 * scale * smooth_noise(rng, len(image), 20 * scale)
        wave = np.sin(2 * np.pi * along / (rng.uniform(5, 8) * scale))
        image -= (rng.uniform(0.5, 2.5) * np.maximum(wave, 0))[..., None]


def _freckles(rng: Generator, image: Field, side: int, scale: float) -> None:
    """Small brown spots that are no lesion."""
    spots = np.zeros((side, side), np.float32)
    for x, y in rng.uniform(0, side, (int(rng.integers(0, 7)), 2)):
        radius = max(1, round(float(rng.uniform(1.0, 3.4) * scale)))
        cv2.circle(spots, (round(float(x)), round(float(y))), radius, float(rng.uniform(0.25, 0.6)), -1, cv2.LINE_AA)
    soft = cv2.GaussianBlur(spots, (0, 0), 0.9 * scale)
    image += (_PIGMENTS[0] * 0.9 - image) * soft[..., None]


def _light(rng: Generator, xx: Field, yy: Field, side: int) -> Field:
    """A gradient and a fall-off to the corners."""
    angle = rng.uniform(0, 2 * np.pi)
    slope = ((xx - side / 2) * np.cos(angle) + (yy - side / 2) * np.sin(angle)) / side
    radius = np.hypot(xx - side / 2, yy - side / 2) / side
    return np.asarray(1 + rng.uniform(0, 0.38) * slope - rng.uniform(0, 0.75) * np.maximum(radius - 0.25, 0) ** 1.5)


def _hairs(rng: Generator, image: Field, side: int) -> None:
    """Curved, tapering, mostly dark hairs."""
    count = int(rng.choice([0, 2, 5, 9, 16], p=[0.35, 0.2, 0.2, 0.15, 0.1]))
    t = np.linspace(0, 1, 24)[:, None]
    dark = rng.random() < 0.85
    colour = np.array([46, 34, 30] if dark else [222, 205, 180], np.float32) + rng.normal(0, 8, 3)
    layer = np.zeros((side * 2, side * 2), np.float32)
    lean = rng.uniform(0, np.pi)
    for _ in range(count):
        start = rng.uniform(-0.1, 1.1, 2) * side * 2
        angle = lean + rng.normal(0, 0.5)
        step = np.array([np.cos(angle), np.sin(angle)]) * rng.uniform(0.5, 1.4) * side * 2
        bend = np.array([-step[1], step[0]]) * rng.normal(0, 0.22)
        points = start + t * step + 4 * t * (1 - t) * bend
        thick = int(rng.integers(1, 4))
        cv2.polylines(
            layer, [points.round().astype(np.int32)], False, float(rng.uniform(0.55, 0.95)), thick, cv2.LINE_AA
        )
    cover = cv2.resize(layer, (side, side), interpolation=cv2.INTER_AREA)[..., None]
    image += (colour.astype(np.float32) - image) * cover


def _bubbles(rng: Generator, image: Field, xx: Field, yy: Field, scale: float) -> None:
    """Air in the gel: bright rings with a highlight."""
    if rng.random() > 0.3:
        return
    for x, y in rng.uniform(0, len(image), (int(rng.integers(1, 6)), 2)):
        radius = rng.uniform(1.5, 5) * scale
        distance = np.hypot(xx - x, yy - y)
        ring = np.exp(-np.square((distance - radius) / (0.7 * scale)))
        shine = np.exp(-np.square(np.hypot(xx - x + radius / 2, yy - y + radius / 2) / (0.9 * scale)))
        image += ((250 - image) * (0.35 * ring + 0.8 * shine)[..., None]).astype(np.float32)


def _ruler(rng: Generator, image: Field, side: int) -> None:
    """The dark ticks of a scale along one edge."""
    edge, every = int(rng.integers(4)), int(rng.integers(5, 9))
    turned = np.rot90(image, edge)
    for number, at in enumerate(range(int(rng.integers(every)), side, every)):
        turned[: 8 if number % 5 == 0 else 4, at] *= 0.35
