"""What the network sees, and that its answer comes back onto the patient's own voxels."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import monai.transforms as mt
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from omegaconf import OmegaConf

from kernels.errors import InputError
from tasks.common.volumes.geometry import Grid
from tasks.common.volumes.reading import read_volume
from tasks.common.volumes.volume import Volume
from tasks.common.volumes.writing import write_mask
from tasks.meningioma.intensities import normalise
from tasks.meningioma.preparation import Preparation, Prepared, SlidingWindow, WholeVolume, bounding_box
from tasks.meningioma.way import Way
from tests.common.made_volumes import TUMOUR, VARIANTS, affine_of, centred, dice, inside, made, nifti_variant

CONFIG = Path(__file__).parents[2] / "conf" / "data" / "volumes.yaml"
SMALL = {"size": (48, 52, 44)}


def volume_of(grid: Grid, seed: int = 0) -> Volume:
    return Volume(made(grid, seed)[0], grid.affine, Path("made"))


def one_hot(label: np.ndarray, classes: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.eye(classes, dtype=np.float32)[label].transpose(3, 0, 1, 2).copy())


def truth(volume: Volume) -> Volume:
    return Volume(inside(volume.grid, TUMOUR).astype(np.uint8), volume.affine, volume.path, volume.nifti)


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_mask_comes_back_onto_the_inputs_grid(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "a.nii.gz"
    nib.save(nifti_variant(kind), source)
    volume = read_volume(source)
    mask = truth(volume)
    recipes: list[tuple[Preparation, float]] = [
        (SlidingWindow(), 1.0),
        (SlidingWindow(crop=False), 1.0),
        (SlidingWindow(spacing=(1.0, 1.0, 1.0)), 0.97),
        (WholeVolume(**SMALL), 0.97),
        (WholeVolume(size=(72, 72, 72), crop=False, back="corner"), 0.94),
    ]
    for recipe, least in recipes:
        prepared = recipe.prepare([volume])
        label = prepared.label(mask)
        assert label.shape == tuple(prepared.image.shape[1:]) and label.dtype == np.uint8
        restored = prepared.restore(one_hot(label))
        assert restored.shape == (2, *volume.grid.shape) and restored.dtype == np.float32
        np.testing.assert_allclose(restored.sum(0), 1, atol=1e-5)
        found = prepared.mask(one_hot(label))
        np.testing.assert_array_equal(found, restored.argmax(0))
        if least == 1.0:
            assert prepared.way.is_exact
            np.testing.assert_array_equal(found, mask.data)
        assert dice(found, mask.data) >= least, (kind, recipe)
        assert dice(prepared.mask(one_hot(label), cut_first=True), mask.data) > 0.85
    after = nib.load(write_mask(tmp_path / "out.nii.gz", found, volume))
    before = nib.load(source)
    assert all(after.header[name] == before.header[name] for name in ("qform_code", "sform_code", "xyzt_units"))
    np.testing.assert_allclose(after.affine, before.affine, atol=1e-6)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
def test_the_network_sees_the_same_head_whatever_the_files_axes(axes: str) -> None:
    pictures = []
    for letters in ("RAS", axes):
        shape = (60, 64, 56)
        affine = affine_of(letters)
        size = tuple(int(n) for n in np.abs(np.linalg.inv(affine[:3, :3])) @ shape)
        grid = Grid(size, centred(affine, size))  # type: ignore[arg-type]
        rng = np.random.default_rng(0)
        data = 400 * inside(grid, ((0, 0, 0), (22, 26, 20))) + 500 * inside(grid, TUMOUR)
        volume = Volume((data + rng.uniform(0, 1)).astype(np.float32), grid.affine, Path("a"))
        pictures.append(WholeVolume(**SMALL).prepare([volume]).image)
    torch.testing.assert_close(pictures[0], pictures[1], atol=1e-4, rtol=0)


def test_an_image_without_a_head_is_used_whole() -> None:
    grid = Grid((20, 18, 16), np.eye(4))
    data = np.zeros(grid.shape, np.float32)
    data[3:5, 2, 2] = 1
    recipe = WholeVolume(size=(16, 16, 16), normalise="zscore", threshold=1e6)
    prepared = recipe.prepare([Volume(data, np.eye(4), Path("a"))])
    assert prepared.way.box == grid.shape and "whole image is used" in prepared.notes[0]
    dark = WholeVolume(size=(16, 16, 16)).prepare([Volume(data * 0 + 3, np.eye(4), Path("a"))])
    assert dark.way.box == grid.shape and not dark.image.any()
    assert SlidingWindow().prepare([Volume(data * 0, np.eye(4), Path("a"))]).image.shape == (1, *grid.shape)


def test_intensities_match_monai() -> None:
    rng = np.random.default_rng(0)
    data = rng.normal(50, 10, (40, 36, 70)).astype(np.float32) * (rng.random((40, 36, 70)) > 0.3)
    for how, options in (("zscore_nonzero", {"nonzero": True}), ("zscore", {})):
        ours = np.asfortranarray(data)
        normalise(ours, how)
        theirs = mt.NormalizeIntensity(**options)(torch.from_numpy(data.copy())[None])[0]
        np.testing.assert_allclose(ours, np.asarray(theirs), atol=1e-4)
    ours = data.copy()
    normalise(ours, "minmax", (1, 99))
    theirs = mt.ScaleIntensityRangePercentiles(1, 99, 0, 1, clip=True)(torch.from_numpy(data.copy())[None])[0]
    np.testing.assert_allclose(ours, np.asarray(theirs), atol=1e-5)
    ours = data.copy()
    normalise(ours, "none", window=(10, 40))
    assert (ours.min(), ours.max()) == (10, 40)
    with_none = data.copy()
    normalise(with_none, "none")
    np.testing.assert_array_equal(with_none, data)


def test_axes_and_spacing_match_monai() -> None:
    grid = Grid((20, 30, 12), centred(affine_of("LIP", (1.5, 1.0, 2.0), 0.2), (20, 30, 12)))
    volume = volume_of(grid)
    ours = SlidingWindow(normalise="none", crop=False).prepare([volume])
    meta = MetaTensor(torch.from_numpy(volume.data.copy())[None], affine=torch.from_numpy(grid.affine))
    turned = mt.Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(meta)
    np.testing.assert_array_equal(ours.image.numpy(), turned.numpy())
    np.testing.assert_allclose(ours.way.working.affine, turned.affine.numpy(), atol=1e-9)
    fine = SlidingWindow(normalise="none", crop=False, spacing=(1.0, 1.0, 1.0)).prepare([volume])
    spaced = mt.SpatialResample()(
        turned, dst_affine=torch.from_numpy(fine.way.working.affine), spatial_size=fine.way.working.shape
    )
    np.testing.assert_allclose(fine.image.numpy(), spaced.numpy(), atol=0.2)  # of 900; MONAI's grid is rounded


def test_channels_on_another_grid_are_brought_to_the_first() -> None:
    first = volume_of(Grid((44, 48, 40), centred(affine_of(), (44, 48, 40))))
    second = volume_of(Grid((30, 30, 26), centred(affine_of("LPS", (1.6, 1.7, 1.8), 0.1), (30, 30, 26))))
    for recipe in (WholeVolume(size=(40, 40, 40)), SlidingWindow()):
        prepared = recipe.prepare([first, second])
        assert len(prepared.notes) == 1 and "resampled to the first" in prepared.notes[0]
        a, b = (channel.flatten().double() for channel in prepared.image)
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.9
        assert not recipe.prepare([first, first]).notes


def test_classes_and_cutoffs() -> None:
    grid = Grid((24, 26, 22), centred(affine_of("LPS", (1.1, 1.2, 1.3)), (24, 26, 22)))
    prepared = WholeVolume(size=(24, 24, 24)).prepare([volume_of(grid)])
    logits = torch.randn(4, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    values = (2 * logits).softmax(0)
    restored = prepared.restore(values)
    np.testing.assert_array_equal(prepared.mask(values), restored.argmax(0))
    for cutoff in (0.3, 0.8):
        expected = np.where(restored[1:].sum(0) >= cutoff, restored[1:].argmax(0) + 1, 0)
        agree = prepared.mask(values, cutoff) == expected
        assert agree.mean() > 0.9999  # a rounding's width of the cut-off apart
    rough = prepared.mask(values, cut_first=True)
    assert set(np.unique(rough)) <= {0, 1, 2, 3} and rough.shape == grid.shape
    with pytest.raises(ValueError, match="the network sees"):
        prepared.restore(values[:, 1:])


def test_a_tiny_tumour_is_not_lost_to_a_coarse_grid() -> None:
    grid = Grid((40, 40, 40), centred(affine_of(), (40, 40, 40)))
    volume = volume_of(grid)
    mask = np.zeros(grid.shape, np.uint8)
    mask[20, 21, 22] = 1
    mask[25, 25, 25] = 2
    label = WholeVolume(size=(12, 12, 12)).prepare([volume]).label(Volume(mask, grid.affine, Path("a")))
    assert (label == 1).sum() == 1 and (label == 2).sum() == 1


def test_recipes_and_ways_survive_as_plain_values() -> None:
    config = OmegaConf.load(CONFIG).preparation
    recipe: Preparation = Preparation.from_config(config)
    assert recipe == WholeVolume()
    assert Preparation.from_config(OmegaConf.merge(config, {"recipe": "sliding"})) == SlidingWindow()
    changed = Preparation.from_config(
        OmegaConf.merge(
            config, {"recipe": "sliding", "spacing": [1, 1, 2], "window": [-100, 300], "normalise": "zscore"}
        )
    )
    for one in (recipe, changed):
        assert Preparation.from_dict(json.loads(json.dumps(one.as_dict()))) == one
    prepared = changed.prepare([volume_of(Grid((20, 20, 20), affine_of("LPS")))])
    way = Way.from_dict(json.loads(json.dumps(prepared.way.as_dict())))
    values = torch.rand(2, *way.size)
    np.testing.assert_array_equal(Prepared(prepared.image, way).restore(values), prepared.restore(values))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"recipe": "hole"}, "'hole' is not known. Did you mean 'whole'"),
        ({"normalise": "zscor"}, "'zscor' is not known. Did you mean 'zscore'"),
        ({"sise": [1, 2, 3]}, "'sise' is not known. Did you mean 'size'"),
        ({"size": [128, 128]}, "size=\\[128, 128\\] must be three whole numbers"),
        ({"size": [128, 128, 0.5]}, "must be three whole numbers"),
        ({"recipe": "sliding", "patch": [1, 64, 64]}, "patch=\\[1, 64, 64\\] must be"),
        ({"spacing": [1, 1, 0]}, "must be three lengths"),
        ({"percentiles": [99, 1]}, "the lower first"),
        ({"recipe": "sliding", "window": [3, 1]}, "the lower first"),
        ({"back": "center"}, "Did you mean 'centre'"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Preparation.from_config(OmegaConf.create(given))


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_memory_stays_within_a_few_copies_of_the_volume(traced: None) -> None:
    """A volume of 512 x 512 x 600 is 0.6 GB in float32; nothing may hold more than a few of these at a time."""
    grid = Grid((96, 96, 110), centred(affine_of("LPS", (0.5, 0.5, 0.5), 0.0), (96, 96, 110)))
    volume = volume_of(grid)
    unit, start = volume.data.nbytes, tracemalloc.get_traced_memory()[0]
    for recipe, before, after in ((WholeVolume(**SMALL), 1.5, 4.0), (SlidingWindow(), 3.3, 4.0)):
        tracemalloc.reset_peak()
        prepared = recipe.prepare([volume])
        assert tracemalloc.get_traced_memory()[1] - start < before * unit
        probabilities = torch.rand(2, *prepared.way.size)
        tracemalloc.reset_peak()
        prepared.mask(probabilities)
        prepared.restore(probabilities)
        assert tracemalloc.get_traced_memory()[1] - start < after * unit


def test_bounding_box() -> None:
    mask = np.zeros((5, 6, 7), bool)
    assert bounding_box(mask) is None
    mask[1, 2, 3] = mask[3, 2, 6] = True
    assert bounding_box(mask) == ((1, 2, 3), (3, 1, 4))


def test_a_real_head_comes_back(shared_data: Path) -> None:
    folder = shared_data / "nifti" / "pyradiomics"
    from tasks.common.volumes.reading import read_label

    volume, label = read_volume(folder / "brain1_image.nrrd"), read_label(folder / "brain1_label.nrrd")
    prepared = WholeVolume().prepare([volume])
    assert prepared.image.shape == (1, 128, 128, 144)
    found = prepared.mask(one_hot(prepared.label(label)))
    assert dice(found, label.data) > 0.93  # slices of 6.5 mm, the tumour is on a few of them
    exact = SlidingWindow().prepare([volume])
    np.testing.assert_array_equal(exact.mask(one_hot(exact.label(label))), label.data)
