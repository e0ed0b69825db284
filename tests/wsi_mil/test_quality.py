"""Ink is told from stain, and sharp tiles from blurred ones."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from tasks.wsi_mil.quality import pen_mask, sharpness

STAINS = [(190, 110, 170), (120, 60, 140), (225, 160, 200), (150, 100, 60), (120, 130, 180), (244, 244, 244)]
INKS = [(40, 165, 140), (30, 60, 200), (210, 25, 35), (20, 20, 22), (60, 170, 70)]


@pytest.mark.parametrize("colour", STAINS)
def test_stains_and_glass_are_not_ink(colour: tuple[int, int, int]) -> None:
    assert not pen_mask(np.full((60, 60, 3), colour, np.uint8)).any()


@pytest.mark.parametrize("colour", INKS)
def test_ink_is_found_where_it_is(colour: tuple[int, int, int]) -> None:
    image = np.full((100, 100, 3), STAINS[0], np.uint8)
    image[40:60, :] = colour
    found = pen_mask(image, grow=0)
    assert found[44:56].all()
    assert not found[:34].any() and not found[66:].any()
    assert pen_mask(image).sum() > found.sum()


def test_blur_lowers_sharpness() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    values = [sharpness(tile if s == 0 else cv2.GaussianBlur(tile, (0, 0), s)) for s in (0, 1, 2, 4)]
    assert values == sorted(values, reverse=True)
    assert sharpness(np.full((64, 64, 3), 128, np.uint8)) == 0.0


def test_real_pens_are_found_and_real_tissue_is_not(shared_data: Path) -> None:
    shares = {}
    for path in sorted((shared_data / "histo" / "histolab_tiles").glob("*.png")):
        image = cv2.imread(str(path))
        assert image is not None
        shares[path.stem] = float(pen_mask(cv2.cvtColor(image, cv2.COLOR_BGR2RGB)).mean())
    for name, share in shares.items():
        if "pen" in name:
            assert share > 0.15, (name, share)
        else:
            assert share < 0.04, (name, share)
