"""The demo's slides: readable, scaled, repeatable, and with what the masks and labels say in them."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest

from kernels.errors import InputError
from tasks.wsi_mil.demo import DemoCohort, cache_folder, make_cohort
from tasks.wsi_mil.demo.paint import COARSE, paint_slide

WIDTH, HEIGHT = 1536, 1024


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    return make_cohort(tmp_path_factory.mktemp("demo"), num_slides=8, seed=3, width=WIDTH, height=HEIGHT)


def rows(cohort: DemoCohort) -> list[dict[str, str]]:
    with cohort.labels.open(newline="") as file:
        return list(csv.DictReader(file))


def mask_of(cohort: DemoCohort, slide_id: str) -> np.ndarray:
    return cv2.imread(str(cohort.masks / f"{slide_id}.png"), cv2.IMREAD_GRAYSCALE)


def test_openslide_reads_a_tiled_pyramid_at_half_a_micrometre(cohort: DemoCohort) -> None:
    with openslide.OpenSlide(cohort.slides / "P01-1.tif") as slide:
        assert slide.level_dimensions == tuple((WIDTH >> k, HEIGHT >> k) for k in range(4))
        assert slide.properties["tiff.ResolutionUnit"] == "centimeter"
        assert 10_000 / float(slide.properties["tiff.XResolution"]) == 0.5
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        assert slide.properties["openslide.level[0].tile-width"] == "256"
        fine = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        coarse = np.asarray(slide.read_region((0, 0), 2, slide.level_dimensions[2]).convert("RGB"))
    reduced = cv2.resize(fine, coarse.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(reduced.astype(int) - coarse).mean() < 4


def test_the_files_show_what_was_painted(cohort: DemoCohort) -> None:
    painted, mask = paint_slide(np.random.default_rng([3, 0]), WIDTH, HEIGHT, with_tumour=False, pen=False)
    with openslide.OpenSlide(cohort.slides / "P01-1.tif") as slide:
        read = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    assert np.abs(read.astype(int) - painted).mean() < 4
    assert not mask.any()


def test_labels_masks_and_slides_belong_together(cohort: DemoCohort) -> None:
    table = rows(cohort)
    assert len(table) == 8
    assert {f"{row['slide_id']}.tif" for row in table} == {path.name for path in cohort.slides.iterdir()}
    assert {f"{row['slide_id']}.png" for row in table} == {path.name for path in cohort.masks.iterdir()}
    for row in table:
        mask = mask_of(cohort, row["slide_id"])
        assert mask.shape == (HEIGHT // COARSE, WIDTH // COARSE)
        assert mask.any() == (row["label"] == "tumour")
    labels = defaultdict(set)
    for row in table:
        labels[row["patient"]].add(row["label"])
    assert all(len(found) == 1 for found in labels.values()), "the slides of a patient share its label"
    assert {next(iter(found)) for found in labels.values()} == {"normal", "tumour"}


def test_the_default_cohort_has_patients_with_two_slides(tmp_path: Path) -> None:
    from tasks.wsi_mil.demo.cohort import _Parameters, _plan

    plan = _plan(_Parameters(24, 7, 3072, 2304))
    slides = defaultdict(list)
    for slide in plan:
        slides[slide.patient].append(slide.label)
    assert len(plan) == 24
    assert len({slide.slide_id for slide in plan}) == 24
    assert 16 <= len(slides) <= 20
    assert sorted(len(own) for own in slides.values())[-1] == 2
    assert sum(slide.label == "tumour" for slide in plan) == 12
    assert {slide.label for slide in plan if slide.pen} == {"normal", "tumour"}, "a pen mark says nothing of the label"


def test_planted_regions_are_darker_than_the_rest_of_the_tissue(cohort: DemoCohort) -> None:
    for row in rows(cohort):
        if row["label"] == "normal":
            continue
        mask = mask_of(cohort, row["slide_id"]) > 0
        with openslide.OpenSlide(cohort.slides / f"{row['slide_id']}.tif") as slide:
            image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        small = cv2.resize(image, mask.shape[::-1], interpolation=cv2.INTER_AREA).astype(float)
        tissue = (small[..., 1] < 215) & ~mask
        assert mask.mean() > 0.005
        assert small[mask, 0].mean() < small[tissue, 0].mean() - 15, "haematoxylin absorbs red"


def test_most_of_a_slide_is_white_or_pink(cohort: DemoCohort) -> None:
    with openslide.OpenSlide(cohort.slides / "P01-1.tif") as slide:
        image = np.asarray(slide.get_thumbnail((400, 400)), dtype=int)
    corner = image[:12, :12].reshape(-1, 3)
    assert corner.min() > 230
    assert np.ptp(corner.mean(0)) < 5, "the background is nearly grey"
    tissue = image[image.min(-1) < 215]
    assert 0.15 < len(tissue) / image[..., 0].size < 0.7
    red, green, blue = tissue.mean(0)
    assert red > blue > green


def test_the_seed_decides_every_pixel() -> None:
    def painted(seed: int) -> np.ndarray:
        return paint_slide(np.random.default_rng(seed), 1024, 1024, with_tumour=True, pen=True)[0]

    first = painted(1)
    assert np.array_equal(first, painted(1))
    assert not np.array_equal(first, painted(2))


def test_files_are_the_same_byte_for_byte(cohort: DemoCohort, tmp_path: Path) -> None:
    again = make_cohort(tmp_path, num_slides=8, seed=3, width=WIDTH, height=HEIGHT, workers=1)
    for slide_id in ("P01-1", "P04-1"):
        for folder, suffix in (("slides", "tif"), ("masks", "png")):
            one = (getattr(cohort, folder) / f"{slide_id}.{suffix}").read_bytes()
            assert one == (getattr(again, folder) / f"{slide_id}.{suffix}").read_bytes()


def test_an_interrupted_cohort_is_continued_and_a_whole_one_left_alone(cohort: DemoCohort) -> None:
    def make() -> None:
        make_cohort(cohort.labels.parent, num_slides=8, seed=3, width=WIDTH, height=HEIGHT)

    slides = sorted(cohort.slides.iterdir())
    kept, lost = slides[0], slides[3]
    expected, before = lost.read_bytes(), {path: path.stat().st_mtime_ns for path in slides}
    make()
    assert {path: path.stat().st_mtime_ns for path in slides} == before
    lost.unlink()
    make()
    assert lost.read_bytes() == expected
    assert kept.stat().st_mtime_ns == before[kept]


def test_a_folder_of_other_slides_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "mine.svs").touch()
    with pytest.raises(InputError, match="not the demo's"):
        make_cohort(tmp_path)
    (tmp_path / "cohort.json").write_text(json.dumps({"seed": 1}))
    with pytest.raises(InputError, match="of other parameters"):
        make_cohort(tmp_path)


@pytest.mark.parametrize("wrong", [{"num_slides": 1}, {"width": 1000}, {"height": 1030}, {"width": 16}])
def test_impossible_parameters_are_refused(wrong: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(next(iter(wrong.values())))):
        make_cohort(tmp_path, **wrong)  # type: ignore[arg-type]


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOVEA_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FOVEA_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fovea"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fovea"


@pytest.mark.slow
def test_untrained_features_tell_planted_tiles_from_others(cohort: DemoCohort) -> None:
    """Without this no attention module could find the regions in the demo."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    import backbones

    encoder = backbones.create_encoder("resnet18")
    features, planted, slide_of = [], [], []
    side, step = 224, 224 // COARSE
    for number, row in enumerate(rows(cohort)):
        mask = mask_of(cohort, row["slide_id"]) > 0
        with openslide.OpenSlide(cohort.slides / f"{row['slide_id']}.tif") as slide:
            image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        tiles, shares = [], []
        for y in range(0, HEIGHT - side + 1, side // 2):
            for x in range(0, WIDTH - side + 1, side // 2):
                share = mask[y // COARSE : y // COARSE + step, x // COARSE : x // COARSE + step].mean()
                tile = image[y : y + side, x : x + side]
                if (tile[..., 1] < 215).mean() > 0.3 and (share == 0 or share > 0.5):
                    tiles.append(tile)
                    shares.append(share)
        features.append(encoder(torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)).numpy())
        planted += [share > 0 for share in shares]
        slide_of += [number] * len(tiles)
    x, y, held_out = np.concatenate(features), np.array(planted), np.array(slide_of) >= 4
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(x[~held_out], y[~held_out])
    assert roc_auc_score(y[held_out], model.decision_function(x[held_out])) > 0.95
