"""Tissue is found on biopsies, resections and stained glass alike, and never dropped in silence."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from kernels.errors import InputError
from tasks.common.contours import Contour
from tasks.wsi_mil.contours import write_geojson
from tasks.wsi_mil.slides import open_slide
from tasks.wsi_mil.tissue import PRESETS, TissueOptions, clam_contours, find_tissue, overview
from tests.wsi_mil.slide_files import tissue_image, write_pyramid


def found_share(path: Path, **options: object) -> float:
    with open_slide(path) as slide:
        return find_tissue(slide, TissueOptions(**options)).share  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["auto", "biopsy"])
def test_the_ellipse_of_tissue_is_found(tmp_path: Path, preset: str) -> None:
    path = write_pyramid(tmp_path / "a.tif", tissue_image(3000, 2600), levels=3)
    ellipse = np.pi / 4 * (2 * 650) * (2 * 1000) / (3000 * 2600)
    assert found_share(path, preset=preset) == pytest.approx(ellipse, rel=0.05)


def test_a_small_biopsy_survives_auto_and_its_loss_is_explained_for_other_presets(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", tissue_image(600, 500))
    assert found_share(path) > 0.2
    with pytest.raises(
        InputError, match=r"preset=clam drops all 1 pieces.*min_area is 100; use data\.tissue\.preset=auto"
    ):
        found_share(path, preset="clam")
    assert found_share(path, preset="clam", min_area=0.1) > 0.2


def test_very_little_tissue_is_kept_with_a_remark(tmp_path: Path) -> None:
    image = np.full((2000, 2000, 3), 244, np.uint8)
    image[1000:1040, 900:960] = (180, 90, 160)
    path = write_pyramid(tmp_path / "a.tif", image)
    with open_slide(path) as slide:
        tissue = find_tissue(slide)
    assert len(tissue.contours) == 1
    assert "very little tissue" in tissue.remarks[0]


def test_debris_beside_a_large_piece_is_left_out(tmp_path: Path) -> None:
    image = tissue_image(4000, 4000)
    image[100:140, 100:140] = (180, 90, 160)
    path = write_pyramid(tmp_path / "a.tif", image, levels=3)
    with open_slide(path) as slide:
        tissue = find_tissue(slide)
    assert len(tissue.contours) == 1
    assert not tissue.mask[:60, :60].any()


@pytest.mark.parametrize("glass", [(255, 255, 255), (238, 240, 243), (245, 238, 222), (0, 0, 0)])
def test_glass_without_tissue_is_refused_whatever_its_tint(tmp_path: Path, glass: tuple[int, int, int]) -> None:
    noise = np.random.default_rng(0).normal(0, 1, (800, 700, 1)).round().astype(int)
    image = np.clip(np.array(glass) + noise, 0, 255).astype(np.uint8)
    path = write_pyramid(tmp_path / "empty.tif", image)
    with pytest.raises(InputError, match=r"slide 'empty': no tissue found.*data\.tissue\.annotations"):
        found_share(path)


def test_a_yellowish_lamp_and_a_black_frame_are_not_tissue(tmp_path: Path) -> None:
    image = tissue_image(2000, 2000)
    image[(image == 243).all(axis=2)] = (245, 238, 220)
    clean = found_share(write_pyramid(tmp_path / "a.tif", image))
    framed = cv2.copyMakeBorder(image[50:-50, 50:-50], 50, 50, 50, 50, cv2.BORDER_CONSTANT, value=(2, 0, 0))
    assert clean == pytest.approx(np.pi * 500 * 666 / 4e6, rel=0.05)
    assert found_share(write_pyramid(tmp_path / "b.tif", framed)) == pytest.approx(clean, rel=0.05)


def test_a_slide_without_colour_is_found_by_darkness(tmp_path: Path) -> None:
    grey = np.repeat(tissue_image(1500, 1500).mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    with open_slide(write_pyramid(tmp_path / "a.tif", grey)) as slide:
        tissue = find_tissue(slide)
    assert tissue.share == pytest.approx(np.pi * 375 * 500 / 1500**2, rel=0.1)
    assert "by darkness" in tissue.remarks[0]


def test_a_slide_that_is_all_tissue_is_all_tissue(tmp_path: Path) -> None:
    grain = np.random.default_rng(0).normal(0, 20, (900, 900, 1))
    image = np.clip(np.array([190, 110, 170]) + grain, 0, 255).astype(np.uint8)
    assert found_share(write_pyramid(tmp_path / "a.tif", image)) > 0.98


def test_the_result_does_not_depend_on_the_levels_of_the_file(tmp_path: Path) -> None:
    image = tissue_image(4200, 4200)
    many = found_share(write_pyramid(tmp_path / "many.tif", image, levels=6))
    one = found_share(write_pyramid(tmp_path / "one.tif", image, levels=1))
    assert many == pytest.approx(one, rel=0.02)


def test_the_whole_slide_can_be_taken(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", np.full((300, 400, 3), 255, np.uint8))
    assert found_share(path, preset="none") == 1.0


def test_pen_marks_are_cut_out_when_asked(tmp_path: Path) -> None:
    image = tissue_image(2400, 2400)
    cv2.line(image, (0, 1100), (2400, 1300), (40, 165, 140), 160)
    path = write_pyramid(tmp_path / "a.tif", image)
    with open_slide(path) as slide:
        with_ink = find_tissue(slide)
        without = find_tissue(slide, TissueOptions(reject_pen=True))
    middle = tuple(side // 2 for side in with_ink.mask.shape)
    assert with_ink.mask[middle] and not without.mask[middle]
    assert any("marked with a pen" in remark for remark in without.remarks)
    top = without.mask.shape[0] // 4
    assert without.mask[top, middle[1]]


def test_outlines_drawn_by_hand_replace_the_search(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", tissue_image(1000, 1000))
    folder = tmp_path / "hand"
    write_geojson(folder / "a.geojson", [Contour(np.array([[0, 0], [500, 0], [500, 400], [0, 400]]))])
    with open_slide(path) as slide:
        tissue = find_tissue(slide, TissueOptions(annotations=folder))
        assert tissue.share == pytest.approx(0.2, abs=0.005)
        write_geojson(folder / "a.geojson", [Contour(np.array([[5000, 0], [5500, 0], [5500, 400]]))])
        with pytest.raises(InputError, match="no outline with an area inside slide 'a'"):
            find_tissue(slide, TissueOptions(annotations=folder))


def test_contour_areas_and_holes_obey_the_preset() -> None:
    image = np.full((400, 400, 3), 245, np.uint8)
    image[50:350, 50:350] = (180, 90, 160)
    image[100:200, 100:200] = 245
    image[250:260, 250:260] = 245
    scale = (16.0, 16.0)
    contours, pieces, largest = clam_contours(image, scale, PRESETS["biopsy"])
    assert (len(contours), pieces) == (1, 1)
    assert len(contours[0].holes) == 1
    assert contours[0].area == pytest.approx((300 * 300 - 100 * 100) * 256, rel=0.05)
    assert largest == pytest.approx((300 * 300 - 100 * 100 - 100) / 1024, rel=0.05)
    assert clam_contours(image, scale, PRESETS["clam"])[0] == []


def test_the_overview_is_a_level_where_one_fits_and_reduced_where_none_does(tmp_path: Path) -> None:
    with open_slide(write_pyramid(tmp_path / "a.tif", tissue_image(2048, 1024), levels=1)) as slide:
        image, scale = overview(slide)
    assert image.shape[:2] == (1024, 512)
    assert scale == (2.0, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "biopsi"}, "data.tissue.preset 'biopsi' is not known. Did you mean 'biopsy'"),
        ({"saturation": 9}, "data.tissue.saturation has no meaning with data.tissue.preset=auto"),
        ({"preset": "clam", "median": 4}, "data.tissue.median=4 must be odd"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        TissueOptions(**options)  # type: ignore[arg-type]


def test_the_outline_of_a_real_slide_follows_its_tissue(shared_data: Path) -> None:
    with open_slide(shared_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        tissue = find_tissue(slide)
        image, _ = overview(slide)
    assert len(tissue.contours) == 1
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    assert grey[tissue.mask].mean() < 200 < grey[~tissue.mask].mean()
    assert 0.3 < tissue.share < 0.5
