"""The learning-rate schedule rises, falls and stays within its bounds."""

import pytest

from tasks.common.schedules import half_cosine


def test_warm_up_is_linear_from_zero_and_meets_the_cosine() -> None:
    rates = [half_cosine(epoch, 20, 4, 2e-4, 1e-6) for epoch in (0, 1, 2, 4)]
    assert rates == pytest.approx([0, 0.5e-4, 1e-4, 2e-4])


def test_the_cosine_is_halfway_in_the_middle_and_ends_at_the_minimum() -> None:
    assert half_cosine(12, 20, 4, 1.0, 0.2) == pytest.approx(0.6)
    assert half_cosine(20, 20, 4, 1.0, 0.2) == pytest.approx(0.2)
    assert half_cosine(25, 20, 4, 1.0, 0.2) == pytest.approx(0.2)


def test_without_warm_up_training_starts_at_the_full_rate() -> None:
    assert half_cosine(0, 50, 0, 1e-4, 0) == pytest.approx(1e-4)


def test_a_warm_up_as_long_as_training_never_divides_by_zero() -> None:
    assert half_cosine(5, 5, 5, 1.0, 0.0) == pytest.approx(1.0)
    assert half_cosine(6, 5, 5, 1.0, 0.0) == pytest.approx(0.0)
