"""Prepared volumes are kept, changed at random and put into batches, bit for bit the same from a seed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from kernels.errors import InputError
from tasks.common.samplers import EpochSampler
from tasks.meningioma.augmentation import apply, augmentation, patches
from tasks.meningioma.cases import CaseSet
from tasks.meningioma.data import load_cases
from tasks.meningioma.loading import Augment, VolumeDataset, VolumeStore, make_loader, measure_loading
from tasks.meningioma.preparation import SlidingWindow, WholeVolume
from tasks.meningioma.spatial import RandSpatial, spatial_grid
from tests.common.made_volumes import dice, write_pair

CONFIG = Path(__file__).parents[2] / "conf" / "data" / "volumes.yaml"
RECIPE = WholeVolume(size=(24, 26, 28))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> CaseSet:
    root = tmp_path_factory.mktemp("cases")
    for number in range(4):
        write_pair(root / f"c{number}", shape=(36 + number, 40, 32), seed=number)
    return load_cases(OmegaConf.merge(OmegaConf.load(CONFIG), {"path": str(root)})).cases


IDS = ["c0", "c1", "c2", "c3"]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"]) and a["way"] == b["way"]


def test_every_cache_gives_the_same_items(cases: CaseSet, tmp_path: Path) -> None:
    stores = [VolumeStore(cases, RECIPE, cache, folder=tmp_path) for cache in ("memory", "disk", "none")]
    for case_id in IDS:
        items = [store.item(case_id) for store in stores]
        assert items[0]["image"].shape == (1, 24, 26, 28) and items[0]["label"].dtype == torch.uint8
        assert same(items[0], items[1]) and same(items[0], items[2])
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 4
    again = VolumeStore(cases, RECIPE, "disk", folder=tmp_path)
    assert same(again.item("c2"), stores[0].item("c2")) and sorted(tmp_path.iterdir()) == kept
    VolumeStore(cases, WholeVolume(size=(20, 20, 20)), "disk", folder=tmp_path).item("c0")
    assert len(list(tmp_path.iterdir())) == 5
    prepared = again.prepared("c1")
    label = stores[0].item("c1")["label"][0].long()
    mask = prepared.mask(torch.nn.functional.one_hot(label, 2).permute(3, 0, 1, 2).float())
    assert dice(mask, cases.read_label(cases.cases[1]).data) > 0.9


def test_the_budget_decides_between_memory_and_disk(cases: CaseSet, tmp_path: Path) -> None:
    assert VolumeStore(cases, RECIPE, "auto", 1.0).cache == "memory"
    assert VolumeStore(cases, RECIPE, "auto", 1e-5, tmp_path).cache == "disk"
    with pytest.raises(InputError, match="'ram' is not known"):
        VolumeStore(cases, RECIPE, "ram")


@pytest.mark.parametrize("name", ["paper", "strong"])
def test_what_is_random_follows_from_the_seed(name: str, cases: CaseSet) -> None:
    store = VolumeStore(cases, RECIPE, "memory")
    before = store.item("c0")["image"].clone()
    dataset = VolumeDataset(IDS, store, Augment(change=augmentation(name)))
    seeds = range(12)
    first = [dataset[(0, seed)][0] for seed in seeds]
    torch.rand(1), np.random.default_rng(1)
    second = [dataset[(0, seed)][0] for seed in reversed(seeds)][::-1]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    assert sum(not torch.equal(first[0][0], other[0]) for other in first[1:]) >= 9
    assert torch.equal(store.item("c0")["image"], before)
    for image, label, _ in first:
        assert type(image) is torch.Tensor and image.dtype == torch.float32 and image.isfinite().all()
        assert label.dtype == torch.uint8 and set(label.unique().tolist()) <= {0, 1}
        inside, outside = image[0][label == 1], image[0][label == 0]
        assert len(inside) and inside.mean() > outside.mean() + 0.2  # the label went where the tumour did


def test_epochs_differ_and_repeat(cases: CaseSet) -> None:
    def batches(epoch: int, workers: int = 0) -> list[Any]:
        dataset = VolumeDataset(IDS, VolumeStore(cases, RECIPE, "memory"), Augment(change=augmentation("paper")))
        sampler = EpochSampler(4, seed=3)
        sampler.current_epoch = lambda: epoch
        return list(make_loader(dataset, 2, sampler, workers))

    a, b, c, d = batches(0), batches(0), batches(1), batches(1, workers=1)
    assert a[0].image.shape == (2, 1, 24, 26, 28) and a[0].label.dtype == torch.int64
    assert a[0].label.shape == (2, 24, 26, 28)
    for one, other in ((a, b), (c, d)):
        assert all(torch.equal(x, y) for p, q in zip(one, other, strict=True) for x, y in zip(p, q, strict=True))
    assert not torch.equal(a[0].image, c[0].image)


def test_patches_hold_the_tumour_as_often_as_asked(cases: CaseSet) -> None:
    store = VolumeStore(cases, SlidingWindow(), "memory")
    crop = Augment(crop=patches((12, 14, 10), samples=8, foreground=1.0))
    parts = VolumeDataset(IDS, store, crop)[(1, 5)]
    assert len(parts) == 8 and all(image.shape == (1, 12, 14, 10) for image, _, _ in parts)
    assert all(label.any() for _, label, _ in parts)
    larger = VolumeDataset(IDS, store, Augment(crop=patches((64, 16, 16)), change=augmentation("strong")))[(0, 1)]
    assert larger[0][0].shape == (1, 64, 16, 16)
    loader = make_loader(VolumeDataset(IDS, store, crop), 2, EpochSampler(4, 1))
    assert next(iter(loader)).image.shape[0] == 16
    control = {"image": torch.rand(1, 20, 20, 20), "label": torch.zeros(1, 20, 20, 20, dtype=torch.uint8)}
    assert apply(patches((8, 8, 8), 2), control, 0)[1]["image"].shape == (1, 8, 8, 8)
    with pytest.raises(InputError, match="cannot form one batch"):
        next(iter(make_loader(VolumeDataset(IDS, store), 4)))


def test_a_projection_turns_shifts_and_tilts_as_stated() -> None:
    image = torch.rand(1, 1, 9, 9, 9)
    sample = torch.nn.functional.grid_sample
    still = sample(image, spatial_grid((9, 9, 9), (0, 0, 0), (0, 0, 0), (0, 0, 0)), align_corners=False)
    torch.testing.assert_close(still, image)
    for axis in range(3):
        turned = sample(
            image, spatial_grid((9, 9, 9), [np.pi / 2 * (k == axis) for k in range(3)], (0, 0, 0), (0, 0, 0)),
            align_corners=False,
        )  # fmt: skip
        dims = [d + 2 for d in range(3) if d != axis]
        quarter = [torch.rot90(image, sign, dims) for sign in (1, -1)]
        assert min(float((turned - q).abs().max()) for q in quarter) < 1e-5
        shift = [2 / 9 * (k == axis) for k in range(3)]
        moved = sample(image, spatial_grid((9, 9, 9), (0, 0, 0), shift, (0, 0, 0)), align_corners=False)
        torch.testing.assert_close(moved.narrow(axis + 2, 1, 8), image.narrow(axis + 2, 0, 8), atol=1e-5, rtol=0)
    # A quarter turn of a box that is not a cube keeps lengths in voxels.
    bar = torch.zeros(1, 1, 5, 21, 11)
    bar[..., 2, 10, :] = 1
    grid = spatial_grid((5, 21, 11), (np.pi / 2, 0, 0), (0, 0, 0), (0, 0, 0))
    assert sample(bar, grid, align_corners=False)[0, 0, 2, :, 5].sum() == pytest.approx(11, abs=1e-3)
    grid = spatial_grid((9, 9, 9), (0, 0, 0), (0, 0, 0), (0.1, 0, 0))[0]
    x = (torch.arange(9) * 2 + 1) / 9 - 1
    torch.testing.assert_close(grid[:, 4, 4, 2], x / (1 + 0.1 * x))


def test_zoom_and_deformation_do_what_they_say() -> None:
    still = spatial_grid((6, 7, 8), (0, 0, 0), (0, 0, 0), (0, 0, 0))
    twice = spatial_grid((6, 7, 8), (0, 0, 0), (0, 0, 0), (0, 0, 0), zoom=2.0)
    torch.testing.assert_close(twice * 2, still)
    same = np.full((7, 7, 7, 3), 0.25) * [1, 2, 3]  # equal control points: a translation, in the order D, H, W
    moved = spatial_grid((6, 7, 8), (0, 0, 0), (0, 0, 0), (0, 0, 0), control=same)
    torch.testing.assert_close(moved, still + torch.tensor([0.75, 0.5, 0.25]))
    rng = np.random.default_rng(0)
    bent = spatial_grid((40, 41, 42), (0, 0, 0), (0, 0, 0), (0, 0, 0), control=rng.uniform(-0.2, 0.2, (7, 7, 7, 3)))[0]
    for axis in range(3):  # nothing folds: neighbours stay in order
        assert (bent[..., 2 - axis].diff(dim=axis) > 0).all()


def test_outside_has_the_lowest_intensity() -> None:
    change = RandSpatial(shift=0.4, prob=1.0)
    change.set_random_state(0)
    item = {"image": torch.full((2, 8, 8, 8), -3.0), "label": torch.ones(1, 8, 8, 8, dtype=torch.uint8)}
    item["image"][1] = 5.0
    item["image"][:, 4, 4, 4] += 1
    found = change(item)
    assert found["image"][0].min() == -3 and found["image"][1].min() == 5
    assert (found["label"] == 0).any() and found["label"].dtype == torch.uint8


def test_what_cannot_be_loaded_is_refused(cases: CaseSet) -> None:
    with pytest.raises(InputError, match=r"'papre' is not known. Did you mean 'paper'"):
        augmentation("papre")
    with pytest.raises(InputError, match="from 0 to 2"):
        augmentation("paper", -1)
    assert augmentation("none") is None
    store = VolumeStore(cases, RECIPE, "none")
    for batch, workers, sentence in ((0, 0, "batch_size=0"), (1, -1, "workers=-1"), (1, "two", "workers=two")):
        with pytest.raises(InputError, match=sentence):
            make_loader(VolumeDataset(IDS, store), batch, None, workers)  # type: ignore[arg-type]


def test_loading_is_measured(cases: CaseSet, tmp_path: Path) -> None:
    rates = measure_loading(cases, RECIPE, Augment(change=augmentation("paper")), rounds=1, folder=tmp_path)
    assert set(rates) == {"none", "disk", "memory", "memory_augmented"}
    assert rates["memory"] > rates["none"] > 0
