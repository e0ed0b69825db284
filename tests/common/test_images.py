"""Every kind of picture and mask file that is read, and every kind that is refused."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from kernels.errors import InputError
from tasks.common import images
from tasks.common.images import read_image, read_mask

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
GREY = RGB[..., 0]
DEEP = RNG.integers(0, 65536, (20, 30), dtype=np.uint16)
FLAGS = GREY > 99


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm"])
def test_colours_come_back_as_they_are(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), RGB)
    np.testing.assert_array_equal(read_mask(tmp_path / f"a{suffix}").array, RGB)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".gif", ".pgm"])
def test_grey_has_one_channel(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), GREY[..., None])
    np.testing.assert_array_equal(read_mask(tmp_path / f"a{suffix}").array, GREY)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_keep_their_depth(suffix: str, tmp_path: Path) -> None:
    colours = np.stack([DEEP, DEEP // 2, DEEP // 4], 2)
    cv2.imwrite(str(tmp_path / f"grey{suffix}"), DEEP)
    cv2.imwrite(str(tmp_path / f"rgb{suffix}"), colours[..., ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / f"grey{suffix}"), DEEP[..., None])
    np.testing.assert_array_equal(read_image(tmp_path / f"rgb{suffix}"), colours)
    np.testing.assert_array_equal(read_mask(tmp_path / f"grey{suffix}").array, DEEP)


def test_a_deep_pgm_keeps_its_depth(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.pgm"), DEEP)
    np.testing.assert_array_equal(read_image(tmp_path / "a.pgm"), DEEP[..., None])
    np.testing.assert_array_equal(read_mask(tmp_path / "a.pgm").array, DEEP)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_one_bit_is_a_mask_and_a_black_and_white_image(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(FLAGS).save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_mask(tmp_path / f"a{suffix}").array > 0, FLAGS)
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), FLAGS[..., None] * np.uint8(255))


def test_a_palette_gives_indices_and_colours_but_greys_where_all_are_grey(tmp_path: Path) -> None:
    indices = (GREY // 100).astype(np.uint8)
    picture = Image.fromarray(indices, mode=None)
    picture = picture.convert("P")
    picture.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    for name in ("colours.png", "colours.tif", "colours.gif", "colours.bmp"):
        picture.save(tmp_path / name)
        mask = read_mask(tmp_path / name)
        np.testing.assert_array_equal(mask.array, indices)
        assert mask.colours is not None
        np.testing.assert_array_equal(mask.colours[indices == 1][0], [200, 0, 0])
        assert read_image(tmp_path / name).shape == (20, 30, 3)
    picture.putpalette([255, 255, 255, 0, 0, 0, 9, 9, 9])
    picture.save(tmp_path / "greys.gif")
    np.testing.assert_array_equal(read_mask(tmp_path / "greys.gif").array, np.array([255, 0, 9])[indices])


def test_transparency_is_dropped_and_the_camera_is_turned(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([RGB, GREY])).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), RGB)
    np.testing.assert_array_equal(read_mask(tmp_path / "alpha.png").array, RGB)
    Image.fromarray(np.dstack([GREY, GREY])).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "la.png").array, GREY)
    np.testing.assert_array_equal(read_image(tmp_path / "la.png"), GREY[..., None])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (30, 20, 3)


def test_arrays_are_masks(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", GREY)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.npy").array, GREY)
    np.save(tmp_path / "b.npy", GREY.astype(np.float32))
    np.testing.assert_array_equal(read_mask(tmp_path / "b.npy").array, GREY)
    np.save(tmp_path / "c.npy", GREY / 3)
    with pytest.raises(InputError, match="whole numbers"):
        read_mask(tmp_path / "c.npy")
    np.save(tmp_path / "d.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="cannot be read"):
        read_mask(tmp_path / "d.npy")


def test_every_unusable_file_has_its_sentence(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    cv2.imwrite(str(tmp_path / "deep.png"), np.stack([DEEP] * 3, 2))
    deep = (tmp_path / "deep.png").read_bytes()
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "short_deep.png").write_bytes(deep[: len(deep) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "text.tif").write_text("not an image")
    Image.fromarray(RGB).save(tmp_path / "film.gif", save_all=True, append_images=[Image.fromarray(255 - RGB)])
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([RGB, RGB, RGB]), photometric="rgb")
    tifffile.imwrite(tmp_path / "float.tif", GREY.astype(np.float32))
    tifffile.imwrite(tmp_path / "channels.tif", np.zeros((8, 8, 6), np.uint8), photometric="minisblack")
    for name, sentence in {
        "empty.png": "is empty (0 bytes)",
        "short.png": "cannot be read as an image",
        "short_deep.png": "cannot be read as an image",
        "text.jpg": "cannot be read as an image",
        "text.tif": "cannot be read as an image",
        "film.gif": "is an animation",
        "pages.tif": "holds 3 pages",
        "float.tif": "float32 samples",
        "channels.tif": "holds",
        "nowhere.png": "does not exist",
    }.items():
        with pytest.raises(InputError) as caught:
            read_image(tmp_path / name)
        assert sentence in str(caught.value), name
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_as_large_as_a_slide_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_LARGEST", 500)
    for suffix in (".png", ".tif"):
        Image.fromarray(RGB).save(tmp_path / f"slide{suffix}")
        with pytest.raises(InputError, match="30 x 20 pixels, too many"):
            read_image(tmp_path / f"slide{suffix}")
