"""Probabilities of whole images, windows, flips and ensembles; filters of components; cuts."""

import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kernels.errors import InputError
from tasks.common.segmentation.inference import Inference, classes_of, drop_small, predict_probabilities
from tasks.common.segmentation.memory import explain_out_of_memory, what_fits
from tasks.common.segmentation.module import mean_dice


class _Pointwise(nn.Module):
    """Logits from each voxel alone, so that windows and flips must not change anything."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), self.slope * x], 1)


class _Directed(nn.Module):
    """Logits that know left from right."""

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.arange(x.shape[-1], dtype=x.dtype).expand_as(x)
        return torch.cat([torch.zeros_like(x), ramp], 1)


@pytest.mark.parametrize("size", [(9,), (7, 12), (9, 6, 11)])
def test_windows_and_flips_of_a_pointwise_network_change_nothing(size: tuple[int, ...]) -> None:
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(1))
    models = [_Pointwise(1.0), _Pointwise(-0.5)]
    expected = torch.stack([model(image[None])[0].softmax(0) for model in models]).mean(0)
    hows = [Inference(), Inference(flips="all"), Inference(flips="axes")]
    if len(size) > 1:
        hows.append(Inference(patch_size=(5,) * len(size), overlap=0.6, flips="all", batch_size=3))
    for how in hows:
        out = predict_probabilities(models, image, how)
        assert out.shape == (2, *size)
        assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("patch", "given", "expected"),
    [((24,) * 3, None, 8), ((64,) * 3, None, 4), ((128, 128, 144), None, 1), ((24,) * 3, 3, 3), (None, None, 1)],
)
def test_small_windows_go_through_together(patch: tuple[int, ...] | None, given: int | None, expected: int) -> None:
    assert Inference(patch_size=patch, batch_size=given).windows_at_once() == expected


def test_windows_together_are_what_they_are_alone() -> None:
    seen: list[int] = []

    class Counted(_Pointwise):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    image = torch.randn(1, 11, 12, 13, generator=torch.Generator().manual_seed(1))
    hows = [Inference(patch_size=(6, 6, 6), batch_size=count) for count in (1, None)]
    alone, together = (predict_probabilities([Counted(1.0)], image, how) for how in hows)
    assert max(seen) == 8 and torch.allclose(alone, together, atol=1e-6)


def test_flips_make_the_answer_symmetric_and_count_each_step() -> None:
    steps: list[int] = []
    how = Inference(flips="all", flip_axes=(1,))
    out = predict_probabilities([_Directed()], torch.zeros(1, 3, 6), how, on_step=lambda: steps.append(1))
    assert torch.allclose(out, out.flip(2))
    assert len(steps) == 2


def test_small_components_go_and_the_largest_stays() -> None:
    mask = np.zeros((8, 8, 3), np.uint8)
    mask[0:2, 0:2, 0] = 1  # 4 voxels
    mask[5:8, 5:8, :] = 1  # 27
    mask[2, 2, 1] = 1  # touches the first by a corner only
    mask[0, 7, 0] = 2
    assert (drop_small(mask, 4) > 0).sum() == 31
    assert (drop_small(mask, 0, largest_only=True) == 1).sum() == 27
    assert (drop_small(mask, 0, largest_only=True) == 2).sum() == 1
    assert drop_small(np.zeros((2, 2), np.uint8), 5, largest_only=True).sum() == 0


def test_cuts() -> None:
    p = np.array([[0.6, 0.2, 0.35], [0.3, 0.5, 0.4], [0.1, 0.3, 0.25]])
    assert classes_of(p, None).tolist() == [0, 1, 1]
    assert classes_of(p, 0.3).tolist() == [1, 1, 1]
    assert classes_of(p, 0.45).tolist() == [0, 1, 0]
    assert classes_of(p[:2], 0.4).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"flips": "both"}, "inference.flips=both"),
        ({"overlap": 1.0}, "inference.overlap=1.0"),
        ({"batch_size": 0}, "inference.batch_size=0"),
        ({"patch_size": (0, 4)}, "inference.patch_size"),
        ({"flips": "all", "flip_axes": (3,)}, "axes 0 to 1"),
        ({"patch_size": (4, 4, 4)}, "needs 2 lengths"),
    ],
)
def test_wrong_settings_are_one_sentence(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        predict_probabilities([_Pointwise(1.0)], torch.zeros(1, 6, 6), Inference(**settings))  # type: ignore[arg-type]


def test_what_filled_the_memory_is_released_before_less_is_tried() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def fill() -> None:
        large = torch.zeros(1000)
        alive.append(weakref.ref(large))
        raise RuntimeError("could not create a primitive")

    def step(_batch: int, size: tuple[int, ...]) -> None:
        assert all(held() is None for held in alive)
        if max(size) > 32:
            fill()
        if max(size) < 32:
            raise InputError("too small for the network")

    def never(batch: int, size: tuple[int, ...]) -> None:
        step(batch, tuple(n + 48 for n in size))

    fits = r"training.batch_size=1 with data.size=\[32,32\] fits"
    with pytest.raises(InputError, match=fits), explain_out_of_memory(step, 2, (64, 64)):
        fill()
    with (
        pytest.raises(InputError, match="not even one small image fits"),
        explain_out_of_memory(never, 1, (64, 64)),
    ):
        fill()


def test_dice_of_an_image() -> None:
    label = torch.tensor([[0, 1, 1], [2, 2, -1]])
    assert mean_dice(label.clamp_min(0), label, 4) == 1
    predicted = torch.tensor([[0, 1, 0], [2, 2, 3]])
    assert mean_dice(predicted, label, 4) == pytest.approx((2 / 3 + 1) / 2)
    assert mean_dice(torch.zeros(2, 2), torch.zeros(2, 2), 2) == 1
    assert mean_dice(torch.ones(2, 2), torch.zeros(2, 2), 2) == 0


def test_what_fits_is_said_when_memory_runs_out() -> None:
    def step(batch: int, size: tuple[int, ...]) -> None:
        if batch * np.prod(size) > 40_000:
            raise torch.OutOfMemoryError("out of memory")

    assert what_fits(step, 8, (32, 32, 32)) == (1, (32, 32, 32))
    assert what_fits(step, 1, (128, 64, 64)) == (1, (48, 16, 16))
    with (
        pytest.raises(InputError, match=r"4 images of 32x32x32.*training.batch_size=1 fits"),
        explain_out_of_memory(step, 4, (32, 32, 32)),
    ):
        step(4, (32, 32, 32))
    with (
        pytest.raises(InputError, match=r"8 images of .*batch_size=2 fits"),
        explain_out_of_memory(lambda batch, size: step(batch // 2, size), 4, (24, 24, 24), per_item=2),
    ):
        step(8, (32, 32, 32))
    with pytest.raises(ValueError, match="something else"), explain_out_of_memory(step, 4, (32, 32, 32)):
        raise ValueError("something else")
