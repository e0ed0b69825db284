"""Loss and thresholds of networks with several exits."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backbones.early_exit import (
    evaluate_exits,
    exit_indices,
    exit_loss,
    find_thresholds,
    geometric_shares,
    predict_early,
)
from kernels.errors import InputError


def _logits(confidences: list[float]) -> Tensor:
    """Two-class logits (N, 2) of answer 0 with these probabilities."""
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack((p.log(), (1 - p).log()), dim=1)


def test_the_loss_is_the_published_sum() -> None:
    exits = [torch.randn(6, 5, requires_grad=True) for _ in range(4)]
    target = torch.randint(5, (6,))
    loss = exit_loss(exits, target, temperature=2.0)
    teacher = (exits[3].detach() / 2).softmax(1)
    wanted = sum(w * F.cross_entropy(y, target) for w, y in zip((0.5, 0.5, 1, 1), exits, strict=True))
    for y in exits[:3]:
        log_ratio = teacher.log() - (y / 2).log_softmax(1)
        wanted = wanted + 0.5 * 4 * (teacher * log_ratio).sum(1).mean()
    torch.testing.assert_close(loss, wanted)


def test_the_last_exit_learns_nothing_from_its_pupils() -> None:
    exits = [torch.randn(3, 4, requires_grad=True) for _ in range(4)]
    exit_loss(exits, torch.tensor([0, 1, 2]), weights=(1, 1, 1, 0)).backward()
    assert exits[3].grad is not None and not exits[3].grad.any()


def test_any_number_of_exits_and_any_loss_will_do() -> None:
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    smooth = functools.partial(F.cross_entropy, label_smoothing=0.1)
    torch.testing.assert_close(exit_loss([logits, logits], target, loss=smooth), 2 * smooth(logits, target))


def test_shares_of_the_samples_leave_at_each_exit() -> None:
    exits = [torch.randn(1000, 10) * scale for scale in (1.0, 2.0, 3.0, 4.0)]
    shares = [0.3, 0.25, 0.25, 0.2]
    thresholds = find_thresholds(exits, shares)
    left = evaluate_exits(exits, torch.zeros(1000, dtype=torch.int64), thresholds, costs=(1, 2, 3, 4))
    assert left.shares == pytest.approx(shares)
    assert left.cost == pytest.approx(0.3 + 0.5 + 0.75 + 0.8)


def test_the_most_confident_leave_first_and_the_unsure_stay() -> None:
    exits = [_logits([0.9, 0.6, 0.8, 0.7]), _logits([0.5, 0.55, 0.5, 0.95]), _logits([0.6] * 4)]
    thresholds = find_thresholds(exits, [0.5, 0.25, 0.25])
    assert thresholds == pytest.approx([0.8, 0.95, -math.inf])
    assert exit_indices(exits, thresholds).tolist() == [0, 2, 0, 1]
    result = evaluate_exits(exits, torch.tensor([0, 0, 1, 0]), thresholds)
    assert result.accuracy == 0.75
    assert result.accuracies == [0.5, 1.0, 1.0]


def test_an_exit_without_a_share_is_taken_by_nobody() -> None:
    exits = [torch.randn(8, 3) for _ in range(3)]
    assert find_thresholds(exits, [0.0, 0.0, 1.0]) == [math.inf, math.inf, -math.inf]
    result = evaluate_exits(exits, torch.zeros(8, dtype=torch.int64), [math.inf, math.inf, -math.inf])
    assert result.shares == [0.0, 0.0, 1.0] and math.isnan(result.accuracies[0])


def test_geometric_shares_sum_to_one() -> None:
    assert geometric_shares(0.5, 3) == pytest.approx([4 / 7, 2 / 7, 1 / 7])


class Counting:
    """Two exits for images that carry their own logits; counts how many are computed."""

    def __init__(self) -> None:
        self.computed = 0

    def exits(self, x: Tensor) -> Iterator[Tensor]:
        for logits in x.unbind(1):
            self.computed += 1
            yield logits


def test_a_prediction_stops_at_the_exit_it_needs() -> None:
    sure, unsure = torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.tensor([[0.1, 0.0], [0.0, 9.0]])
    for images, answers, taken, computed in (
        ([sure], [0], [0], 1),
        ([unsure], [1], [1], 2),
        ([sure, unsure], [0, 1], [0, 1], 2),
    ):
        model = Counting()
        logits, where = predict_early(model, torch.stack(images), [0.9, -math.inf])
        assert logits.argmax(1).tolist() == answers
        assert where.tolist() == taken
        assert model.computed == computed


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda y: exit_loss(y, torch.zeros(2).long(), weights=(1, 1)), "2 weights for 3 exits"),
        (lambda y: exit_loss(y, torch.zeros(2).long(), (1, 1, 1), temperature=0), "temperature=0"),
        (lambda y: find_thresholds(y, [0.5, 0.5]), "3 numbers"),
        (lambda y: find_thresholds(y, [0.5, 0.2, 0.2]), "sum 1"),
        (lambda y: exit_indices(y, [0.5]), "1 thresholds for 3 exits"),
        (lambda y: geometric_shares(-1), "ratio=-1"),
        (lambda y: predict_early(Counting(), torch.zeros(1, 2, 2), [2.0, 2.0, 2.0]), "3 thresholds"),
    ],
)
def test_wrong_arguments_are_named(call, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call([torch.randn(2, 3) for _ in range(3)])
