"""Each kind of target: closed forms of its loss and probabilities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.errors import InputError
from tasks.common.balance import balanced_weights
from tasks.wsi_mil.targets import Target, infer_kind


def test_multiclass_loss_is_the_negative_log_probability_of_the_class() -> None:
    target = Target("multiclass", ("a", "b", "c"))
    logits = torch.randn(5, 3)
    y = torch.tensor([0, 1, 2, 1, 0])
    expected = -target.probabilities(logits).log()[torch.arange(5), y]
    torch.testing.assert_close(target.loss(logits, y), expected)


@given(st.lists(st.floats(-20, 20), min_size=4, max_size=4))
def test_ordinal_probabilities_are_a_distribution(values: list[float]) -> None:
    target = Target("ordinal", tuple("01234"))
    p = target.probabilities(torch.tensor([values]))
    assert p.shape == (1, 5)
    assert (p >= 0).all()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)


def test_ordinal_loss_is_minimal_at_the_conditional_frequencies() -> None:
    # Of grades 0, 1, 2 seen 2, 1, 1 times: P(y > 0) = 1/2 and P(y > 1 | y > 0) = 1/2, that is logits of zero.
    target = Target("ordinal", ("0", "1", "2"))
    y = torch.tensor([0, 0, 1, 2])
    logits = torch.zeros(1, 2, requires_grad=True)
    rows = logits.expand(4, 2)
    # Each threshold's own sum of losses has its minimum there; the loss of a row is its mean over the reached ones.
    passed = target.active(y).float()
    reached = torch.tensor([[1.0, 0], [1, 0], [1, 1], [1, 1]])
    plain = torch.nn.functional.binary_cross_entropy_with_logits(rows, passed, reduction="none") * reached
    (gradient,) = torch.autograd.grad(plain.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    torch.testing.assert_close(target.loss(rows, y), plain.sum(1) / reached.sum(1))
    assert target.loss(rows, y)[0].item() == pytest.approx(math.log(2))


def test_active_outputs_follow_the_kind() -> None:
    assert Target("binary", ("a", "b")).active(torch.tensor([1, 0])).tolist() == [[False, True], [True, False]]
    assert Target("ordinal", ("0", "1", "2")).active(torch.tensor([2, 1])).tolist() == [[True, True], [True, False]]
    assert Target("multilabel", ("a", "b")).active(torch.tensor([[1, 0]])).tolist() == [[True, False]]


def test_balanced_weights_have_mean_one_over_the_bags_and_favour_the_rare() -> None:
    y = torch.tensor([0] * 9 + [1])
    weights = torch.tensor(balanced_weights("binary", y, 2))
    assert weights[y].mean().item() == pytest.approx(1)
    assert (weights[1] / weights[0]).item() == pytest.approx(9)


def test_kind_is_inferred_from_the_labels() -> None:
    assert infer_kind("auto", ["a", "b"], 1) == "binary"
    assert infer_kind("auto", ["a", "b", "c"], 1) == "multiclass"
    assert infer_kind("auto", ["a", "b"], 2) == "multilabel"
    with pytest.raises(InputError, match="Did you mean 'ordinal'"):
        infer_kind("ordnal", ["a", "b"], 1)


def test_one_class_is_refused() -> None:
    with pytest.raises(InputError, match="two classes"):
        Target("binary", ("only",))
