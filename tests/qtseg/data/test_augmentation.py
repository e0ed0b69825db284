"""Image, mask and field of view move together, by the amount drawn, and the same again for the same seed."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from kernels.errors import InputError
from tasks.qtseg.augmentation import (
    GEOMETRIC,
    PHOTOMETRIC,
    POLICIES,
    Augmentation,
    Item,
    _affine_grid,
    _Geometry,
    _sampled,
    named,
)


def item(size: tuple[int, int] = (40, 56), channels: int = 3) -> Item:
    """A soft blob whose mask is what is brighter than 100."""
    yy, xx = torch.meshgrid(*(torch.arange(s, dtype=torch.float32) for s in size), indexing="ij")
    bump = 200 * torch.exp(-((yy - size[0] / 2.4) ** 2 + (xx - size[1] / 2.2) ** 2) / (0.03 * size[0] * size[1]))
    ones = torch.ones(2, *size, dtype=torch.uint8)
    return Item(bump.expand(channels, *size).clone(), (bump > 100).to(torch.uint8), ones)


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("size", [(120, 168), (99, 99), (171, 93)])
@pytest.mark.parametrize("name", list(GEOMETRIC))
def test_the_mask_moves_with_the_image(name: str, size: tuple[int, int]) -> None:
    augment = Augmentation((name,), 1, 1)
    for seed in range(6):
        out = augment(item(size), np.random.default_rng(seed))
        assert out.label.dtype == torch.uint8 and set(out.label.unique().tolist()) <= {0, 1}
        assert dice(out.label.bool(), out.image[0] > 100) > 0.95
        assert ((out.image[0] > 5) <= out.flags[0].bool()).float().mean() > 0.97


@pytest.mark.parametrize("name", list(PHOTOMETRIC))
def test_intensities_change_and_nothing_moves(name: str) -> None:
    before = item(channels=1)
    out = Augmentation((name,), 1, 1)(before, np.random.default_rng(1))
    assert torch.equal(out.label, before.label) and torch.equal(out.flags, before.flags)
    assert not torch.equal(out.image, before.image) and out.image.shape == before.image.shape
    assert out.image.min() >= 0 and out.image.max() <= 255 and out.image.isfinite().all()


def test_flips_are_exact_and_happen_every_other_time() -> None:
    before, flipped = item(), 0
    for seed in range(60):
        out = Augmentation(("flip_horizontal",), 1, 1)(before, np.random.default_rng(seed))
        moved = not torch.equal(out.label, before.label)
        flipped += moved
        expected = [part.flip(-1) if moved else part for part in (before.image, before.label)]
        assert torch.equal(out.image, expected[0]) and torch.equal(out.label, expected[1])
    assert 18 <= flipped <= 42


def test_a_translation_moves_by_whole_pixels() -> None:
    before = item((40, 40))
    geometry = _Geometry(1.0)
    geometry.then(np.array([[1, 0, 2 * 6 / 40], [0, 1, 2 * -3 / 40], [0, 0, 1.0]]))  # six to the right, three up
    out = _sampled(before, geometry)
    torch.testing.assert_close(out.image[:, :37, 6:], before.image[:, 3:, :34], atol=1e-3, rtol=0)
    assert torch.equal(out.label[:37, 6:], before.label[3:, :34])
    assert not out.flags[0, :, :6].any() and not out.flags[0, 37:].any() and not out.image[:, :, :5].any()


def test_rotations_are_those_of_pixels_in_oblong_images() -> None:
    size = (60, 90)
    label = torch.zeros(size, dtype=torch.uint8)
    label[25:35, 30:60] = 1  # a bar 30 wide and 10 high around the middle
    geometry = _Geometry(size[1] / size[0])
    geometry.then(geometry.in_pixels(np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])))
    out = _sampled(Item(label[None].float(), label, label[None]), geometry)
    rows, columns = torch.nonzero(out.label, as_tuple=True)
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (15, 44, 40, 49)


def test_the_grid_is_that_of_torch() -> None:
    matrix = np.array([[0.9, -0.3, 0.1], [0.2, 1.1, -0.4], [0, 0, 1]])
    for size in ((5, 8), (1, 1), (31, 2)):
        theta = torch.from_numpy(matrix[:2]).float()[None]
        expected = torch.nn.functional.affine_grid(theta, [1, 1, *size], align_corners=False)
        torch.testing.assert_close(_affine_grid(matrix, *size), expected, atol=1e-6, rtol=0)


def test_operations_put_together_equal_one_after_the_other() -> None:
    before = item((160, 160))
    angle = math.radians(20)
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    steps = [turn, np.diag([1.3, 0.8, 1.0]), np.array([[1, 0.2, 0.05], [0, 1, -0.1], [0, 0, 1]])]
    shifts = torch.from_numpy(np.random.default_rng(0).normal(0, 0.05, (2, 4, 4)).astype(np.float32))
    together, apart = _Geometry(1.0), before
    for position, step in enumerate(steps):
        single = _Geometry(1.0)
        single.then(step)
        apart = _sampled(apart, single)
        together.then(step)
        if position == 1:
            together.bends.append((together.matrix.copy(), shifts))
            bend = _Geometry(1.0, bends=[(np.eye(3), shifts)], only_flips=False)
            apart = _sampled(apart, bend)
    out = _sampled(before, together)
    assert (out.image - apart.image).abs().mean() < 1.0 and (out.image - before.image).abs().mean() > 5
    assert dice(out.label.bool(), apart.label.bool()) > 0.96


def test_the_same_seed_gives_the_same_bits_and_another_something_else() -> None:
    augment = named("strong")
    outs = [augment(item(), np.random.default_rng(seed)) for seed in (3, 3, 4)]
    torch.manual_seed(9)
    assert torch.equal(outs[0].image, outs[1].image) and torch.equal(outs[0].label, outs[1].label)
    assert not torch.equal(outs[0].image, outs[2].image)


def test_none_to_four_of_the_ten_are_drawn() -> None:
    augment = named("paper")
    assert len(augment.operations) == 10 and (augment.fewest, augment.most) == (0, 4)
    same = sum(torch.equal(augment(item(), np.random.default_rng(s)).image, item().image) for s in range(80))
    assert 10 <= same <= 32  # a fifth draws none, and flips happen every other time
    assert torch.equal(named("none")(item(), np.random.default_rng(0)).image, item().image)


def test_strength_scales_and_zero_leaves_the_pixels() -> None:
    weak = Augmentation(("rotate", "noise", "contrast", "translate", "scale", "shear", "piecewise", "blur"), 8, 8, 0.0)
    out = weak(item(), np.random.default_rng(0))
    torch.testing.assert_close(out.image, item().image, atol=1e-2, rtol=0)
    assert torch.equal(out.label, item().label)
    for policy in POLICIES:
        Augmentation.from_config({"policy": policy, "strength": 2.0, "most": None})(item(), np.random.default_rng(1))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2)])
def test_tiny_images_pass(size: tuple[int, int]) -> None:
    every = named("strong")
    for seed in range(10):
        out = Augmentation(every.operations, 15, 15)(item(size), np.random.default_rng(seed))
        assert out.image.shape == (3, *size) and out.image.isfinite().all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"policy": "papr"}, "Did you mean 'paper'"),
        ({"most": 11}, "must be 0 to 10"),
        ({"strength": -1}, "between 0 and 2"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Augmentation.from_config({"policy": "paper", "strength": 1.0, "most": None, **options})
