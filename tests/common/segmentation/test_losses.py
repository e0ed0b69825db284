"""Losses against closed forms, and what deep supervision sums."""

import pytest
import torch

from kernels.errors import InputError
from tasks.common.segmentation.losses import LOSSES, DeepSupervision, cross_entropy, focal, foreground_dice, shares_of


def _case(size: tuple[int, ...] = (2, 5, 7), classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(size[0], classes, *size[1:], generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, size, generator=generator)


def test_cross_entropy_and_dice_equal_their_definitions() -> None:
    logits, label = _case()
    shares = shares_of(label, 3).double()
    assert torch.allclose(cross_entropy(logits, shares), torch.nn.functional.cross_entropy(logits, label))
    p = logits.softmax(1)
    per_class = [
        (2 * (p[:, c] * (label == c)).sum() + 1) / (p[:, c].square().sum() + (label == c).sum() + 1) for c in (1, 2)
    ]
    assert torch.allclose(foreground_dice(p, shares), 1 - sum(per_class) / 2)


def test_focal_without_focus_is_cross_entropy() -> None:
    logits, label = _case()
    shares = shares_of(label, 3).double()
    assert torch.allclose(focal(logits, shares, gamma=0.0), cross_entropy(logits, shares))
    assert focal(logits, shares) < cross_entropy(logits, shares)


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_places_change_nothing_and_get_no_gradient(name: str) -> None:
    logits, label = _case()
    label[:, :2] = -1
    changed = logits.clone()
    changed[:, :, :2] = 7.0
    loss = DeepSupervision(name, 3)
    assert torch.equal(loss([logits], label), loss([changed], label))
    wanted = logits.clone().requires_grad_()
    loss([wanted], label).backward()
    assert wanted.grad is not None
    assert not wanted.grad[:, :, :2].any()
    assert wanted.grad[:, :, 2:].any()


def test_everything_ignored_is_finite() -> None:
    logits, label = _case()
    for name in LOSSES:
        assert torch.isfinite(DeepSupervision(name, 3)([logits], torch.full_like(label, -1)))


@pytest.mark.parametrize("size", [(2, 9), (2, 8, 5), (2, 4, 6, 5)])
def test_levels_are_summed_with_the_reference_reduced_to_each(size: tuple[int, ...]) -> None:
    logits, label = _case(size)
    coarse = logits[(..., *(slice(None, None, 2) for _ in size[1:]))]
    total = DeepSupervision("dice_ce", 3, weights=(1.0, 0.5))([logits, coarse], label)
    finest = DeepSupervision("dice_ce", 3)([logits], label)
    reduced = shares_of(label, 3, coarse.shape[2:])
    assert torch.allclose(reduced.sum(1), torch.ones(()))
    assert torch.allclose(total, finest + 0.5 * LOSSES["dice_ce"](coarse.float(), reduced))


def test_a_small_structure_survives_reduction() -> None:
    label = torch.zeros(1, 16, 16, dtype=torch.long)
    label[0, 3, 3] = 1
    assert shares_of(label, 2, (2, 2))[0, 1, 0, 0] == pytest.approx(1 / 64)


def test_wrong_settings_are_one_sentence() -> None:
    with pytest.raises(InputError, match=r"training.loss.*'dice_xe'.*dice_ce"):
        DeepSupervision("dice_xe", 2)
    with pytest.raises(InputError, match="level_weights"):
        DeepSupervision("dice", 2, weights=[-1.0])
    logits, label = _case()
    with pytest.raises(InputError, match="2 weights; this network has 3 levels"):
        DeepSupervision("dice", 3, weights=[1.0, 1.0])([logits] * 3, label)
