"""Regions of slides: the right pixels at the right size, and one sentence for files that are no slides."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import InputError
from tasks.wsi_mil import slides as slides_module
from tasks.wsi_mil.slides import files_of_slides, open_slide
from tests.wsi_mil.slide_files import tissue_image, write_pyramid

IMAGE = np.random.default_rng(0).integers(0, 256, (301, 453, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tif", IMAGE, levels=3)


def test_a_region_at_full_size_is_the_pixels_themselves(pyramid: Path) -> None:
    with open_slide(pyramid) as slide:
        assert slide.dimensions == (453, 301)
        assert slide.slide_id == "a"
        assert slide.mpp == pytest.approx(0.5, rel=1e-4)
        np.testing.assert_array_equal(slide.read_region(17, 31, 50, 40), IMAGE[31:71, 17:67])


@settings(deadline=None, max_examples=40)
@given(
    x=st.integers(-60, 500), y=st.integers(-60, 340), width=st.integers(1, 90), height=st.integers(1, 90)
)  # fmt: skip
def test_what_lies_outside_a_slide_is_white(pyramid: Path, x: int, y: int, width: int, height: int) -> None:
    padded = np.full((301 + 400, 453 + 400, 3), 255, np.uint8)
    padded[200:501, 200:653] = IMAGE
    with open_slide(pyramid) as slide:
        region = slide.read_region(x, y, width, height)
    np.testing.assert_array_equal(region, padded[y + 200 :, x + 200 :][:height, :width])


@pytest.mark.parametrize(
    ("downsample", "level"), [(1.0, 0), (1.5, 0), (1.99, 1), (2.0, 1), (3.9, 1), (4.0, 2), (9.0, 2)]
)
def test_the_coarsest_level_that_is_fine_enough_is_read(pyramid: Path, downsample: float, level: int) -> None:
    with open_slide(pyramid) as slide:
        assert slide.level_for(downsample) == level


@pytest.mark.parametrize("downsample", [1.0, 1.37, 2.0, 2.7, 4.0, 11.3])
def test_a_reduced_region_has_the_size_and_the_mean_of_the_original(pyramid: Path, downsample: float) -> None:
    with open_slide(pyramid) as slide:
        region = slide.read_region(40, 24, 256, 192, downsample)
    assert region.shape == (round(192 / downsample), round(256 / downsample), 3)
    assert region.mean() == pytest.approx(IMAGE[24:216, 40:296].mean(), abs=1.5)


def test_a_slide_is_never_enlarged(pyramid: Path) -> None:
    with open_slide(pyramid) as slide:
        with pytest.raises(ValueError, match="would enlarge"):
            slide.read_region(0, 0, 10, 10, 0.5)
        assert slide.thumbnail(10_000).shape == IMAGE.shape
        assert slide.thumbnail(100).shape == (66, 100, 3)


def test_a_large_region_read_in_strips_looks_like_one_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pyramid(tmp_path / "one_level.tif", tissue_image(700, 500), levels=1)
    with open_slide(path) as slide:
        at_once = slide.thumbnail(100)
        monkeypatch.setattr(slides_module, "STRIP_PIXELS", 500 * 37)
        in_strips = slide.thumbnail(100)
    assert in_strips.shape == at_once.shape
    assert np.abs(in_strips.astype(int) - at_once).mean() < 1.0


def test_an_untiled_tiff_openslide_refuses_is_read_like_any_slide(tmp_path: Path) -> None:
    path = tmp_path / "plain.tif"
    tifffile.imwrite(path, IMAGE, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.5)
        assert slide.mpp_source == "tiff.XResolution"
        np.testing.assert_array_equal(slide.read_region(10, 20, 30, 40), IMAGE[20:60, 10:40])
        corner = slide.read_region(440, -5, 30, 10)
        np.testing.assert_array_equal(corner[5:, :13], IMAGE[:5, 440:])
        assert (corner[:5] == 255).all()
        assert (corner[:, 13:] == 255).all()


def test_planes_and_transparency_of_a_plain_tiff_are_understood(tmp_path: Path) -> None:
    planes = tmp_path / "planes.tif"
    tifffile.imwrite(planes, np.moveaxis(IMAGE, -1, 0), photometric="rgb", planarconfig="separate")
    with open_slide(planes) as slide:
        np.testing.assert_array_equal(slide.thumbnail(453), IMAGE)
    rgba = np.dstack([IMAGE, np.zeros(IMAGE.shape[:2], np.uint8)])
    rgba[100:, :, 3] = 255
    clear = tmp_path / "clear.tif"
    tifffile.imwrite(clear, rgba, photometric="rgb", extrasamples=["unassalpha"])
    with open_slide(clear) as slide:
        seen = slide.thumbnail(453)
    assert (seen[:100] == 255).all()
    np.testing.assert_array_equal(seen[100:], IMAGE[100:])


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    rgba = np.array([[[100, 0, 255, 128], [9, 9, 9, 0], [9, 8, 7, 255]]], np.uint8)
    np.testing.assert_array_equal(slides_module._on_white(rgba), [[[177, 127, 255], [255, 255, 255], [9, 8, 7]]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.svs", None, "does not exist"),
        ("a.svs", b"", "is empty"),
        ("a.svs", b"not a slide", "in no format OpenSlide reads"),
        ("a.tif", b"not a slide", "cannot be read as TIFF"),
    ],
)
def test_a_file_that_is_no_slide_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_slide(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_grey_or_huge_plain_tiff_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = tmp_path / "grey.tif"
    tifffile.imwrite(grey, IMAGE[..., 0], photometric="minisblack")
    with pytest.raises(InputError, match="first page: 301 x 453, uint8"):
        open_slide(grey)
    plain = tmp_path / "plain.tif"
    tifffile.imwrite(plain, IMAGE, photometric="rgb")
    monkeypatch.setattr(slides_module, "MAX_PLAIN_PIXELS", 1000)
    with pytest.raises(InputError, match="too large to hold in memory"):
        open_slide(plain)


def test_a_truncated_slide_is_refused_where_it_is_damaged_and_readable_elsewhere(tmp_path: Path) -> None:
    path = damaged_slide(tmp_path / "cut.tif")
    with open_slide(path) as slide:
        good = slide.read_region(0, 0, 64, 64)
        with pytest.raises(InputError, match=r"cannot be read .*damaged or incomplete"):
            slide.read_region(0, 256, 64, 64)
        np.testing.assert_array_equal(slide.read_region(0, 0, 64, 64), good)


def test_a_damaged_level_is_replaced_by_level_0(tmp_path: Path) -> None:
    image = tissue_image(512, 512)
    path = write_pyramid(tmp_path / "a.tif", image, levels=2)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[1].dataoffsets[0], tiff.pages[1].databytecounts[0]
    content = bytearray(path.read_bytes())
    content[offset : offset + count] = bytes(count)
    path.write_bytes(content)
    with open_slide(path) as slide:
        region = slide.read_region(0, 0, 128, 128, 2.0)
    expected = cv2.resize(image[:128, :128], (64, 64), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(region, expected)


def test_slides_of_a_folder_are_found_with_sub_folders_in_order(tmp_path: Path) -> None:
    for name in ("b.SVS", "x/a.tif", ".hidden/c.svs", "._d.svs", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert [p.name for p in files_of_slides(tmp_path)] == ["b.SVS", "a.tif"]


def test_real_files_are_read_or_refused(shared_data: Path) -> None:
    folder = shared_data / "wsi"
    with open_slide(folder / "CMU-1-Small-Region.svs") as slide:
        assert (slide.dimensions, slide.mpp, slide.mpp_source) == ((2220, 2967), 0.499, "openslide.mpp-x")
        assert slide.read_region(0, 0, 224, 224).shape == (224, 224, 3)
    with open_slide(folder / "kidney_48_5.tif", mpp=8.0) as slide:
        assert slide.thumbnail(100).shape == (60, 100, 3)
    with open_slide(folder / "openslide_boxes.tiff") as slide, pytest.raises(InputError, match="no microscope has"):
        _ = slide.mpp
    with pytest.raises(InputError, match="Unsupported TIFF compression"):
        open_slide(folder / "openslide_unopenable.tiff")
    with pytest.raises(InputError, match="first page: 480 x 640, uint16"):
        open_slide(folder / "pathml_smalltif.tif")
    with open_slide(folder / "openslide_unreadable.svs") as slide, pytest.raises(InputError, match="region at"):
        slide.thumbnail(100)


def test_a_damaged_slide_can_be_looked_over_with_white_where_it_is_lost(tmp_path: Path) -> None:
    with open_slide(damaged_slide(tmp_path / "cut.tif")) as slide:
        seen = slide.read_whole(2.0, on_bad="white")
        with pytest.raises(InputError, match="cannot be read"):
            slide.read_whole(2.0)
        expected = slide.read_region(0, 0, 256, 256, 2.0)
    assert seen.shape == (256, 128, 3)
    np.testing.assert_array_equal(seen[:128], expected)
    assert (seen[128:] == 255).all()


def damaged_slide(path: Path) -> Path:
    """A slide of 256 x 512 whose lower half cannot be decoded."""
    write_pyramid(path, tissue_image(512, 256), levels=1)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    content = bytearray(path.read_bytes())
    for offset, count in places[len(places) // 2 :]:
        content[offset : offset + count] = bytes(count)
    path.write_bytes(content)
    return path
