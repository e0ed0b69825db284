"""What a threshold alone can do: the best colour channel, cut at one level or at Otsu's, chosen on training images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks.common.crossval import Fold
from tasks.qtseg.data import ImageSet2D, Sample
from tasks.qtseg.loading import read_sample

CHANNELS = ("red", "green", "blue", "grey", "hue", "saturation", "lightness", "a*", "b*")
_SIDES = ("brighter", "darker")
Counts = NDArray[np.int64]


def threshold_baseline(images: ImageSet2D, folds: Sequence[Fold]) -> dict[str, Any]:
    """Mean Dice over all test images of the thresholding that was best on each fold's training images.

    The foreground is whatever is not background, at the images' own size, inside the field of view. The Dice of an
    empty mask is 1 when nothing is found in it, else 0.

    Returns:
        ``what``, ``dice`` (mean over test images), ``cases`` (case id -> Dice), ``rules`` (a sentence per fold).
    """
    place = {sample.case_id: row for row, sample in enumerate(images.samples)}
    foreground, everything = histograms(images)
    dice = dice_of_rules(foreground, everything)
    cases: dict[str, float] = {}
    rules = []
    for fold in folds:
        train, test = ([place[i] for i in ids] for ids in ((*fold.train, *fold.val), fold.test))
        best = np.unravel_index(int(dice[train].mean(0).argmax()), dice.shape[1:])
        cases |= {i: float(dice[row, *best]) for i, row in zip(fold.test, test, strict=True)}
        side, channel, level = (int(v) for v in best)
        cut = "Otsu's threshold of each image" if level == 256 else f"{level}"
        rules.append(f"{CHANNELS[channel]} {_SIDES[side]} than {cut}")
    return {
        "what": "the best threshold on one colour channel, chosen on the training images of each fold",
        "dice": float(np.mean(list(cases.values()))),
        "cases": cases,
        "rules": rules,
    }


def histograms(images: ImageSet2D) -> tuple[Counts, Counts]:
    """Values of the foreground and of all pixels that count, per image and channel: two arrays (n, 9, 256)."""
    found = [_histogram(sample, images) for sample in images.samples]
    return np.stack([f for f, _ in found]), np.stack([e for _, e in found])


def dice_of_rules(foreground: Counts, everything: Counts) -> NDArray[np.float64]:
    """Dice of every image under every rule (n, 2, 9, 257): above or at most level 0 to 255, or Otsu's as level 256."""
    at_most = np.stack([h.cumsum(-1) for h in (foreground, everything)])  # (2, n, 9, 256)
    total = at_most[..., -1:]
    (hits_dark, found_dark), (hits_light, found_light) = at_most, total - at_most
    truth = total[0]
    dice = []
    for hits, found in ((hits_light, found_light), (hits_dark, found_dark)):
        both = found + truth
        dice.append(np.where(both > 0, 2 * hits / np.maximum(both, 1), 1.0))
    fixed = np.stack(dice, 1)  # (n, 2, 9, 256)
    level = otsu(everything)[:, None, :, None]
    of_otsu = np.take_along_axis(fixed, np.broadcast_to(level, (*fixed.shape[:3], 1)), -1)
    return np.concatenate([fixed, of_otsu], -1)


def otsu(histogram: Counts) -> NDArray[np.int64]:
    """Otsu's threshold of histograms (..., 256): the level whose two sides lie furthest apart (...)."""
    share = histogram / np.maximum(histogram.sum(-1, keepdims=True), 1)
    below = share.cumsum(-1)
    mean = (share * np.arange(256)).cumsum(-1)
    spread = np.square(mean[..., -1:] * below - mean)
    between = spread / np.where(below * (1 - below) > 1e-12, below * (1 - below), np.inf)
    return np.asarray(between.argmax(-1))


def _histogram(sample: Sample, images: ImageSet2D) -> tuple[Counts, Counts]:
    image, label, fov = read_sample(sample, images.coding)
    if image.dtype == np.uint16:
        image = (image // 257).astype(np.uint8)
    rgb = np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    hsv, lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV_FULL), cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)
    planes = np.dstack([rgb, grey, hsv[..., :2], lab]).reshape(-1, len(CHANNELS)).astype(np.int64)
    planes += 256 * np.arange(len(CHANNELS))
    counts = np.ones(label.size, bool) if fov is None else fov.ravel() > 0
    shape = (len(CHANNELS), 256)
    inside, all_ = (
        np.bincount(planes[chosen].ravel(), minlength=256 * len(CHANNELS)).reshape(shape)
        for chosen in (counts & (label.ravel() > 0), counts)
    )
    return inside, all_
