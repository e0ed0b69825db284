"""The learning-rate schedule rises, falls and stays within its bounds."""

import pytest

from kernels.errors import InputError
from tasks.common.optimisation import SCHEDULES, Recipe, check_recipe
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


def test_each_schedule_of_a_recipe_begins_with_the_warm_up_and_never_goes_below_its_minimum() -> None:
    for schedule in SCHEDULES:
        recipe = Recipe(lr=1e-2, min_lr=1e-4, epochs=100, warmup_epochs=5, schedule=schedule, step_epochs=10)
        assert recipe.rate(0) == 0
        assert recipe.rate(2.5) == pytest.approx(0.5e-2)
        assert all(1e-4 <= recipe.rate(epoch) <= 1e-2 for epoch in range(5, 101))


def test_steps_and_polynomial_fall_as_stated() -> None:
    steps = Recipe(lr=1e-3, min_lr=1e-5, epochs=350, schedule="step", step_epochs=50)
    assert [steps.rate(e) for e in (49, 50, 100, 349)] == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.5625e-5])
    assert Recipe(lr=1.0, epochs=10, schedule="polynomial").rate(5) == pytest.approx(0.5**0.9)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": 0.0}, "training.lr=0.0"),
        ({"min_lr": 1.0}, "training.min_lr=1.0"),
        ({"epochs": 0}, "training.epochs=0"),
        ({"schedule": "cosin"}, "training.schedule"),
        ({"optimizer": "adm"}, "training.optimizer"),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_recipe(Recipe(**settings))  # type: ignore[arg-type]
