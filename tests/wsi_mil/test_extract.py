"""Tiles reach the encoder as they are in the slide, in order, whatever the number of workers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.errors import InputError
from tasks.wsi_mil.extract import (
    ReadTask,
    TileBatch,
    TileBatches,
    choose_device,
    choose_workers,
    encode,
    read_tiles,
    weights_fingerprint,
)
from tasks.wsi_mil.partial import KEPT, REJECTED, WHITE
from tasks.wsi_mil.slides import open_slide
from tasks.wsi_mil.tiling import TilePlan, plan_tiles
from tests.wsi_mil.slide_files import SmallEncoder, tissue_image, write_pyramid
from tests.wsi_mil.test_slides import damaged_slide

IMAGE = tissue_image(400, 500)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tif", IMAGE)


def planned(path: Path, mpp: float = 0.5) -> TilePlan:
    with open_slide(path) as opened:
        return plan_tiles("a", opened.dimensions, 0.5, opened.level_downsamples, requested_mpp=mpp, tile=64)


def tasks_of(path: Path, count: int = 9) -> list[ReadTask]:
    plan = planned(path)
    grid = plan.grid()
    return [ReadTask(3, path, plan, grid[i : i + count]) for i in range(0, len(grid), count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_tiles_are_the_pixels_of_the_slide_in_order(slide: Path, workers: int) -> None:
    tasks = tasks_of(slide)
    padded = np.full((900, 900, 3), 255, np.uint8)
    padded[:400, :500] = IMAGE
    for task, batch in zip(tasks, TileBatches(tasks, workers, 9, 64), strict=True):
        assert (batch.job, batch.error) == (3, None)
        expected = np.stack([padded[y : y + 64, x : x + 64] for x, y in task.corners])
        np.testing.assert_array_equal(batch.tiles.numpy(), expected.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slide_that_cannot_be_read_gives_its_reason_and_the_next_goes_on(
    slide: Path, tmp_path: Path, workers: int
) -> None:
    bad = damaged_slide(tmp_path / "bad.tif")
    gone = tmp_path / "gone.tif"
    tasks = [*tasks_of(bad, 100), ReadTask(0, gone, planned(slide), np.zeros((1, 2), np.int64)), *tasks_of(slide, 100)]
    first, second, third = TileBatches(tasks, workers, 100, 64)
    assert first.error is not None and "cannot be read" in first.error
    assert second.error is not None and "does not exist" in second.error
    assert third.error is None and len(third.tiles) == 56


def test_unreadable_tiles_can_be_taken_as_white(tmp_path: Path) -> None:
    path = damaged_slide(tmp_path / "bad.tif")
    plan = planned(path)
    with open_slide(path) as opened:
        tiles = np.empty((len(plan.grid()), 64, 64, 3), np.uint8)
        state = read_tiles(opened, plan, plan.grid(), tiles, on_bad_tile="white")
    assert (state == WHITE).sum() == (state == KEPT).sum() == 16
    assert (tiles[state == WHITE] == 255).all()


def test_blurred_tiles_are_rejected_and_not_computed(slide: Path) -> None:
    plan = planned(slide)
    with open_slide(slide) as opened:
        tiles = np.empty((len(plan.grid()), 64, 64, 3), np.uint8)
        state = read_tiles(opened, plan, plan.grid(), tiles, min_sharpness=100.0)
    assert 0 < (state == REJECTED).sum() < len(state)
    seen = []

    class Counting(SmallEncoder):
        def forward(self, tiles: torch.Tensor) -> torch.Tensor:
            seen.append(len(tiles))
            return super().forward(tiles)

    batch = TileBatch(0, torch.from_numpy(tiles).permute(0, 3, 1, 2), torch.from_numpy(state))
    ((_, features),) = encode([batch], Counting(), torch.device("cpu"))
    assert seen == [(state != REJECTED).sum()]
    assert (features[state == REJECTED] == 0).all()
    ((_, everything),) = encode(
        [TileBatch(0, batch.tiles, torch.zeros(len(state)))], SmallEncoder(), torch.device("cpu")
    )
    np.testing.assert_allclose(features[state != REJECTED], everything[state != REJECTED], atol=1e-6)


def test_an_encoder_that_lies_about_its_size_is_our_fault() -> None:
    encoder = SmallEncoder()
    encoder.dim = 5
    batch = TileBatch(0, torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(2))
    with pytest.raises(ValueError, match=r"gave \(2, 12\) for 2 tiles; it says dim=5"):
        list(encode([batch], encoder, torch.device("cpu")))


def test_the_fingerprint_knows_weights_apart() -> None:
    first = weights_fingerprint(SmallEncoder())
    assert first == weights_fingerprint(SmallEncoder())
    assert first != weights_fingerprint(SmallEncoder(seed=1))
    trained = SmallEncoder()
    with torch.no_grad():
        trained.layer.bias += 1e-7
    assert first != weights_fingerprint(trained)


def test_workers_and_device_are_chosen_or_refused() -> None:
    cpu = torch.device("cpu")
    assert choose_workers("auto", cpu) >= 1
    assert choose_workers(0, cpu) == 0 and choose_workers("3", cpu) == 3
    for bad in (-1, "many"):
        with pytest.raises(InputError, match=f"data.workers={bad}"):
            choose_workers(bad, cpu)
    assert choose_device("cpu") == cpu
    with pytest.raises(InputError, match=r"data\.device=cuda:99 cannot be used"):
        choose_device("cuda:99")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_stays_as_it_is_until_two_more_are_taken(slide: Path, workers: int) -> None:
    tasks = tasks_of(slide, 2) * 4
    whole = {id(task): batch.tiles.clone() for task, batch in zip(tasks, TileBatches(tasks, 0, 2, 64), strict=True)}
    held: list[tuple[ReadTask, TileBatch]] = []
    for task, batch in zip(tasks, TileBatches(tasks, workers, 2, 64), strict=True):
        held = [*held[-2:], (task, batch)]
        for earlier, kept in held:
            assert torch.equal(kept.tiles, whole[id(earlier)])
