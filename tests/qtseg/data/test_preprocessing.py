"""What the network sees, and the way back to the image's own pixels."""

import json
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from kernels.errors import InputError
from tasks.qtseg.preprocessing import Preprocessing, in_colour

RNG = np.random.default_rng(0)
SIZES = [(45, 64), (64, 45), (1, 1), (1, 300), (300, 1), (7, 90), (33, 32), (513, 512), (49, 49)]


def image(size: tuple[int, int], channels: int = 3, deep: bool = False) -> np.ndarray:
    high, kind = (65536, np.uint16) if deep else (256, np.uint8)
    return RNG.integers(0, high, (*size, channels), dtype=kind)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize", ["fit", "squash", "native", "tiles"])
def test_any_size_goes_in_and_comes_back(size: tuple[int, int], resize: Any) -> None:
    made = Preprocessing((32, 32), resize)
    prepared = made.prepare(image(size))
    expected = (3, 32, 32) if made.whole else (3, *size)
    assert prepared.tensor.shape == expected and prepared.tensor.dtype == torch.float32
    assert prepared.tensor.isfinite().all()
    probabilities = torch.rand(4, *expected[1:]).softmax(0)
    back = prepared.restore(probabilities)
    assert back.shape == (4, *size) and back.dtype == torch.float32
    torch.testing.assert_close(back.sum(0), torch.ones(size), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="are not probabilities of"):
        prepared.restore(torch.rand(2, 5, 5))
    label = made.label(RNG.integers(0, 4, size, dtype=np.uint8))
    assert label.shape == expected[1:] and label.dtype == torch.int64


def test_the_released_form() -> None:
    """Longest side to the size, the other cut to a whole number, black below, the whole stretched to [-1, 1]."""
    picture = image((45, 64)) // 2 + 60
    prepared = Preprocessing((32, 32)).prepare(picture)
    assert prepared.used == (22, 32)
    area = cv2.resize(picture, (32, 22), interpolation=cv2.INTER_AREA).astype(np.float64)
    expected = 2 * area / area.max() - 1  # the least is the padding's 0
    np.testing.assert_allclose(prepared.tensor[:, :22].permute(1, 2, 0), expected, atol=1e-5)
    assert (prepared.tensor[:, 22:] == -1).all()


@pytest.mark.parametrize(("size", "used"), [((49, 49), (32, 32)), ((98, 49), (32, 16)), ((3, 1000), (1, 32))])
def test_the_longest_side_is_never_cut_short(size: tuple[int, int], used: tuple[int, int]) -> None:
    assert Preprocessing((32, 32)).sizes(size) == (used, (32, 32))


def test_an_oblong_target_holds_the_whole_image() -> None:
    made = Preprocessing((24, 48))
    assert made.sizes((100, 100)) == ((24, 24), (24, 48))
    assert made.sizes((100, 400)) == ((12, 48), (24, 48))


@pytest.mark.parametrize("normalise", ["minmax", "zscore", "fixed", "unit"])
@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_constant_image_is_finite(normalise: str, value: int) -> None:
    for size in ((32, 32), (20, 32)):
        tensor = Preprocessing((32, 32), normalise=normalise).prepare(np.full((*size, 3), value, np.uint8)).tensor
        assert tensor.isfinite().all()
        if normalise == "zscore" or (normalise == "minmax" and (size == (32, 32) or value == 0)):
            assert not tensor.any()


def test_padding_takes_no_part_but_in_minmax() -> None:
    picture = image((20, 40))
    for normalise in ("zscore", "fixed", "unit"):
        tensor = Preprocessing((40, 40), normalise=normalise).prepare(picture).tensor
        assert not tensor[:, 20:].any()
    z = Preprocessing((40, 40), normalise="zscore").prepare(picture).tensor[:, :20]
    torch.testing.assert_close(z.mean((1, 2)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.square().mean((1, 2)), torch.ones(3), atol=1e-4, rtol=0)
    unit = Preprocessing((40, 40), normalise="unit").prepare(picture).tensor[:, :20]
    np.testing.assert_allclose(unit.permute(1, 2, 0), picture / 255, atol=1e-6)


def test_sixteen_bits_and_windows() -> None:
    deep = image((30, 30), 1, deep=True)
    full = Preprocessing((30, 30), colour="grey", normalise="unit")
    np.testing.assert_allclose(full.prepare(deep).tensor[0], deep[..., 0] / 65535, atol=1e-5)
    windowed = Preprocessing((30, 30), colour="grey", normalise="unit", window=(1000, 5000))
    expected = np.clip((deep[..., 0].astype(float) - 1000) / 4000, 0, 1)
    np.testing.assert_allclose(windowed.prepare(deep).tensor[0], expected, atol=2e-5)
    for colour in ("rgb", "ycrcb", "hsv", "lab"):
        shallow = (deep // 257).astype(np.uint8)
        rgb = np.repeat(deep, 3, 2)
        got = Preprocessing((30, 30), colour=colour, normalise="unit").prepare(rgb).tensor
        same = Preprocessing((30, 30), colour=colour, normalise="unit").prepare(np.repeat(shallow, 3, 2)).tensor
        torch.testing.assert_close(got, same, atol=0.012, rtol=0)


def test_colours_and_channels() -> None:
    picture, grey = image((12, 12)), image((12, 12), 1)
    for colour, channels in (("rgb", 3), ("ycrcb", 3), ("hsv", 3), ("lab", 3), ("grey", 1), ("green", 1)):
        made = Preprocessing((12, 12), colour=colour)
        assert made.channels == channels
        assert made.prepare(picture).tensor.shape[0] == made.prepare(grey).tensor.shape[0] == channels
    np.testing.assert_array_equal(in_colour(picture, "green")[..., 0], picture[..., 1])
    np.testing.assert_array_equal(in_colour(grey, "rgb"), np.repeat(grey, 3, 2))


def test_a_mask_survives_the_round_trip() -> None:
    yy, xx = np.mgrid[:200, :150]
    mask = (np.hypot(yy - 90, xx - 70) < 50).astype(np.uint8)
    for resize, size in (("fit", 128), ("squash", 128), ("native", 1), ("fit", 512)):
        made = Preprocessing((size, size), resize)  # type: ignore[arg-type]
        prepared = made.prepare(np.repeat(mask[..., None] * 255, 3, 2))
        label = made.label(mask)
        back = prepared.restore(torch.nn.functional.one_hot(label, 2).permute(2, 0, 1).float()).argmax(0).numpy()
        dice = 2 * (back & mask).sum() / (back.sum() + mask.sum())
        assert dice > 0.985, (resize, size)
        if resize == "native":
            np.testing.assert_array_equal(back, mask)


def test_it_goes_through_json() -> None:
    made = Preprocessing((32, 64), "squash", "lab", "fixed", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (10.0, 4095.0))
    assert Preprocessing.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert Preprocessing.from_dict(json.loads(json.dumps(Preprocessing().to_dict()))) == Preprocessing()
    with pytest.raises(InputError, match="the preprocessing of this checkpoint"):
        Preprocessing.from_dict({"size": [1, 2]})


CONFIG = {
    "img_size": 64, "resize": "fit", "colour": "rgb", "normalise": "minmax", "mean": None, "std": None, "window": None
}  # fmt: skip


def test_it_is_made_from_a_configuration() -> None:
    assert Preprocessing.from_config(OmegaConf.create(CONFIG)) == Preprocessing((64, 64))
    grey = Preprocessing.from_config(OmegaConf.create({**CONFIG, "colour": "grey", "normalise": "fixed"}))
    assert len(grey.mean) == len(grey.std) == 1
    assert Preprocessing.from_config(OmegaConf.create({**CONFIG, "img_size": [32, 48]})).size == (32, 48)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"img_size": 0}, "img_size"),
        ({"img_size": [1, 2, 3]}, "img_size"),
        ({"img_size": 1.5}, "img_size"),
        ({"resize": "crop"}, "data.resize 'crop' is not known"),
        ({"colour": "rbg"}, "Did you mean 'rgb'"),
        ({"normalise": "minmx"}, "Did you mean 'minmax'"),
        ({"normalise": "fixed", "mean": [0.5]}, "data.mean has 1 and data.std 3"),
        ({"normalise": "fixed", "std": [0.5, 0, 1]}, "must be positive"),
        ({"window": [5, 5]}, "the lower first"),
        ({"window": [5]}, "the lower first"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Preprocessing.from_config(OmegaConf.create({**CONFIG, **options}))
