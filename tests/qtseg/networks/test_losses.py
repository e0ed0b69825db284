"""Losses: closed forms, pixels that count for nothing, refusals."""

from __future__ import annotations

import pytest
import torch

from kernels.errors import InputError
from tasks.qtseg.losses import QTSegLoss, binary_dice, categorical_dice, cross_entropy, focal


def certain(target: torch.Tensor, classes: int) -> torch.Tensor:
    """Logits that say ``target`` for sure."""
    return 200 * torch.nn.functional.one_hot(target, classes).movedim(-1, 1).float()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("form", ["released", "mean"])
def test_a_perfect_prediction_costs_nothing(classes: int, form: str) -> None:
    target = torch.randint(classes, (2, 7, 5), generator=torch.Generator().manual_seed(0))
    loss = QTSegLoss(form)(certain(target, classes), target)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-6, rtol=0)


def test_the_forms_differ_by_sum_and_background() -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    target[0, :2] = 1
    logits = certain(torch.where(target == 1, 2, 0), 3)  # class 1 is taken for class 2
    torch.testing.assert_close(categorical_dice(logits, target), torch.tensor(2.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(categorical_dice(logits, target, form="mean"), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_pixels_that_are_not_valid_count_for_nothing() -> None:
    logits, target = torch.randn(2, 3, 6, 8), torch.randint(3, (2, 6, 8))
    valid = torch.zeros(2, 6, 8, dtype=torch.bool)
    valid[:, :, :5] = True
    for form in ("released", "mean"):
        loss = QTSegLoss(form)  # type: ignore[arg-type]
        torch.testing.assert_close(loss(logits, target, valid), loss(logits[..., :5], target[..., :5]))
    one = logits[:, :1], (target > 0).long()
    cut = logits[:, :1, :, :5], (target > 0).long()[..., :5]
    for each in (cross_entropy, focal, binary_dice):
        torch.testing.assert_close(each(*one, valid), each(*cut))
    assert QTSegLoss()(logits[:, :2], target.clamp(max=1), torch.zeros_like(valid)).isfinite()


def test_gradients_are_finite_for_an_empty_target() -> None:
    logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
    QTSegLoss()(logits, torch.zeros(1, 4, 4, dtype=torch.long)).backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


def test_what_is_not_possible_is_said() -> None:
    with pytest.raises(InputError, match="released"):
        QTSegLoss("relased")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"loss\.weights"):
        QTSegLoss(weights=(1.0, -1.0))
