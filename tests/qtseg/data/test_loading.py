"""Batches that repeat bit for bit, a cache that changes nothing, and a check that tells everything at once."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.errors import InputError
from tasks.common.samplers import EpochSampler
from tasks.qtseg.augmentation import named
from tasks.qtseg.checking import check_images, check_set, summary
from tasks.qtseg.data import ImageSet2D
from tasks.qtseg.loading import Batch, SegmentationDataset, Store, collate, make_loader, read_fov
from tasks.qtseg.preprocessing import Preprocessing
from tasks.qtseg.sample_grid import outlines, sample_grid, write_sample_grid
from tests.qtseg.data.files import blob, load, save, write_pairs


def store_of(images: ImageSet2D, size: int = 16, cache: str | bool = "auto", **options: Any) -> Store:
    return Store(Preprocessing((size, size), **options), images.coding, cache)


@pytest.fixture
def images(tmp_path: Path) -> ImageSet2D:
    write_pairs(tmp_path / "set", list("abcdefghi"))
    return load(tmp_path / "set")


def batches(images: ImageSet2D, store: Store, epoch: int, workers: int = 0) -> list[Batch]:
    dataset = SegmentationDataset(images.samples, store, named("strong"))
    sampler = EpochSampler(len(dataset), 3)
    sampler.current_epoch = lambda: epoch
    return list(make_loader(dataset, 4, sampler, workers))


def test_augmentation_follows_from_seed_and_epoch_whoever_reads(images: ImageSet2D) -> None:
    first = batches(images, store_of(images, cache=False), epoch=2)
    assert [len(batch.images) for batch in first] == [4, 4]  # a single image is no batch
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    for store, workers in ((store_of(images), 1), (store_of(images), 0)):
        check_set(images, store)
        assert store.holds(images.samples)
        again = batches(images, store, epoch=2, workers=workers)
        for a, b in zip(first, again, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(first[0].images, batches(images, store, epoch=3)[0].images)


def test_batches_have_the_promised_types(images: ImageSet2D) -> None:
    batch = next(iter(make_loader(SegmentationDataset(images.samples, store_of(images)), 3, workers=0)))
    assert batch.images.shape == (3, 3, 16, 16) and batch.images.dtype == torch.float32
    assert batch.target.shape == (3, 16, 16) and batch.target.dtype == torch.int64
    assert batch.valid.shape == (3, 16, 16) and batch.valid.dtype == torch.bool
    assert batch.position.tolist() == [0, 1, 2]
    assert batch.valid[:, :11].all() and not batch.valid[:, 11:].any()  # 20 x 28 becomes 11 x 16


def test_evaluation_sees_what_prepare_gives(images: ImageSet2D) -> None:
    for options in ({}, {"normalise": "zscore"}, {"resize": "native"}, {"colour": "grey", "resize": "squash"}):
        store = store_of(images, **options)
        tensor, label, _, _ = SegmentationDataset(images.samples, store)[2]
        picture, mask = blob(2)
        torch.testing.assert_close(tensor, store.preprocessing.prepare(picture).tensor)
        assert torch.equal(label, store.preprocessing.label((mask > 0).astype(np.uint8)))


def test_the_field_of_view_decides_what_counts(tmp_path: Path) -> None:
    write_pairs(tmp_path, ["a", "b"])
    for name in "ab":
        fov = np.zeros((20, 28), np.uint8)
        fov[:, :14] = 255
        save(tmp_path / "fov" / f"{name}.png", fov)
    images = load(tmp_path)
    assert read_fov(images.samples[0]).sum() == 280
    _, _, valid, _ = SegmentationDataset(images.samples, store_of(images, 28))[0]
    assert valid[:20, :14].all() and valid.sum() == 280
    save(tmp_path / "fov" / "a.png", np.zeros((20, 28), np.uint8))
    save(tmp_path / "fov" / "b.png", np.full((9, 9), 255, np.uint8))
    problems = check_images(load(tmp_path), store_of(images)).problems
    assert "a.png is black" in problems[0] and "b.png is 9 x 9" in problems[1]


def test_tiles_are_cut_at_full_resolution(tmp_path: Path) -> None:
    for index, size in enumerate(((50, 70), (9, 200), (30, 30))):
        picture, mask = blob(index, size)
        save(tmp_path / "images" / f"{index}.png", picture)
        save(tmp_path / "masks" / f"{index}.png", mask)
    images = load(tmp_path)
    store = store_of(images, 24, resize="tiles", normalise="unit")
    for policy in ("none", "paper"):
        dataset = SegmentationDataset(images.samples, store, named(policy))
        for index in range(3):
            found = [dataset[(index, seed)] for seed in range(12)]
            assert all(t.shape == (3, 24, 24) and y.shape == v.shape == (24, 24) for t, y, v, _ in found)
            assert sum(bool(y.any()) for _, y, _, _ in found) >= 6
            if policy == "none" and index != 1:
                assert all(v.all() for _, _, v, _ in found)
    dataset = SegmentationDataset(images.samples, store, named("none"))
    tile = dataset[(0, 5)][0]
    picture = blob(0, (50, 70))[0].transpose(2, 0, 1) / 255
    windows = np.lib.stride_tricks.sliding_window_view(picture, (24, 24), (1, 2))
    assert np.isclose(windows, tile.numpy()[:, None, None], atol=1e-6).all((0, 3, 4)).any()
    assert SegmentationDataset(images.samples, store)[1][0].shape == (3, 9, 200)


def test_images_of_several_sizes_are_padded_into_one_batch() -> None:
    def one(h: int, w: int, i: int) -> Any:
        return torch.ones(1, h, w), torch.ones(h, w, dtype=torch.int64), torch.ones(h, w, dtype=torch.bool), i

    batch = collate([one(3, 5, 0), one(4, 2, 1)])
    assert batch.images.shape == (2, 1, 4, 5) and batch.images.sum() == batch.valid.sum() == batch.target.sum() == 23
    assert batch.valid.dtype == torch.bool


def test_the_cache_stays_in_its_budget(images: ImageSet2D, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(images)
    size = store.get(images.samples[0]).nbytes
    monkeypatch.setattr("tasks.qtseg.loading._CACHE_BYTES", int(2.5 * size))
    store = store_of(images)
    check_images(images, store)
    assert store.holds(images.samples[:2]) and not store.holds(images.samples[:3])
    with pytest.raises(InputError, match=r"data.cache 'yes' is not known"):
        store_of(images, cache="yes")
    with pytest.raises(InputError, match="batch_size=0"):
        make_loader(SegmentationDataset(images.samples, store), 0)
    with pytest.raises(InputError, match="workers=-1"):
        make_loader(SegmentationDataset(images.samples, store), 1, workers=-1)


def test_everything_that_is_wrong_is_told_at_once(images: ImageSet2D) -> None:
    folder = images.samples[0].image.parent.parent
    (folder / "images" / "a.png").write_bytes(b"")
    whole = (folder / "images" / "b.png").read_bytes()
    (folder / "images" / "b.png").write_bytes(whole[:-80])
    save(folder / "masks" / "c.png", blob(0, (5, 7))[1])
    save(folder / "masks" / "d.png", blob(3)[1] // 2 + np.eye(20, 28, dtype=np.uint8))
    save(folder / "masks" / "e.png", blob(4, (28, 20))[1])
    with pytest.raises(InputError) as caught:
        check_set(images, store_of(images), ["something else."])
    for part in (
        "6 problems",
        "a.png is empty (0 bytes)",
        "b.png cannot be read",
        "c.png is 28 x 20, but its mask c.png is 7 x 5",
        "d.png is not black and one other value (",
        "128: ",
        "(turned by its orientation tag)",
        "something else.",
    ):
        assert part in str(caught.value), part


def test_empty_masks_copies_and_missing_classes(images: ImageSet2D) -> None:
    folder = images.samples[0].image.parent.parent
    save(folder / "masks" / "a.png", np.zeros((20, 28), np.uint8))
    shutil.copy(folder / "images" / "b.png", folder / "images" / "c.png")
    found = check_images(images, store_of(images))
    assert not found.problems and found.pixels["b"].sum() == 560
    assert any("1 image has an empty mask: 'a'" in note for note in found.notes)
    assert any("under different patients, such as b and c" in note for note in found.notes)
    assert "9 images of 28 x 20" in summary(images, found)[0]
    three = load(folder, labels={"x": 255, "y": 9})
    assert check_images(three, store_of(three)).problems == [
        "no image has a pixel of class 'y'; correct data.labels or leave the class out."
    ]
    for name in "abcdefghi":
        save(folder / "masks" / f"{name}.png", np.zeros((20, 28), np.uint8))
    assert check_images(images, store_of(images)).problems == [
        "no image has a pixel of the foreground: all masks are empty."
    ]


def test_the_foreground_must_be_in_the_training_images(tmp_path: Path) -> None:
    for side in ("train", "test"):
        write_pairs(tmp_path / side, ["1", "2"])
    for name in "12":
        save(tmp_path / "train" / "masks" / f"{name}.png", np.zeros((20, 28), np.uint8))
    images = load(tmp_path)
    assert "no training image has a pixel" in check_images(images, store_of(images)).problems[0]


def test_copies_on_two_sides_are_noted(tmp_path: Path) -> None:
    for side in ("train", "test"):
        write_pairs(tmp_path / side, ["1", "2"])
    images = load(tmp_path)
    assert "2 images exist more than once on different sides" in check_images(images, store_of(images)).notes[0]


def test_the_sample_grid_shows_outlines(images: ImageSet2D, tmp_path: Path) -> None:
    dataset = SegmentationDataset(images.samples, store_of(images, 32), named("paper"))
    figure = sample_grid(dataset, images.classes, rows=3, views=2)
    assert len(figure.axes) == 6
    path = write_sample_grid(dataset, images.classes, tmp_path / "grid.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    ring = np.zeros((9, 9), bool)
    ring[1:8, 1:8] = True
    ring[4, 4] = False
    assert len(outlines(ring)) == 2 and not outlines(np.zeros((3, 3), bool))


def test_tiles_are_on_the_scale_of_the_whole_image(tmp_path: Path) -> None:
    # A dark and a bright half: tiles of either alone must not be stretched to the full range.
    image = np.full((40, 80, 3), 10, np.uint8)
    image[:, 40:] = 250
    mask = np.zeros((40, 80), np.uint8)
    mask[10:20, 50:60] = 255
    save(tmp_path / "images" / "a.png", image)
    save(tmp_path / "masks" / "a.png", mask)
    images = load(tmp_path)
    for normalise in ("minmax", "zscore"):
        store = store_of(images, 16, resize="tiles", normalise=normalise)
        whole = SegmentationDataset(images.samples, store)[0][0]
        dataset = SegmentationDataset(images.samples, store, named("none"))
        values = {round(float(v), 4) for seed in range(8) for v in dataset[(0, seed)][0].unique()}
        assert values == {round(float(v), 4) for v in whole.unique()}
