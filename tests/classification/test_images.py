"""Every kind of file that is read, and every kind that is refused."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from kernels.errors import InputError
from tasks.classification.images import read_image
from tasks.common import images

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
GREY = RGB[..., 0]
DEEP = RNG.integers(0, 65536, (20, 30), dtype=np.uint16)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_eight_bit_colours_come_back_as_they_are(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), RGB)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_grey_is_repeated(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), np.repeat(GREY[..., None], 3, 2))


def test_jpeg_is_turned_the_way_the_camera_was_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (30, 20, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("window", [None, (1000, 5000)])
def test_sixteen_bits_are_windowed(suffix: str, window: tuple[int, int] | None, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    cv2.imwrite(str(path), DEEP)
    low, high = window or (0, 65535)
    expected = np.clip((DEEP.astype(float) - low) * 255 / (high - low), 0, 255)
    found = read_image(path, window)
    assert found.dtype == np.uint8
    assert np.abs(found[..., 1] - expected).max() <= 0.51


def test_sixteen_bit_colours_keep_their_order(tmp_path: Path) -> None:
    deep = np.stack([DEEP, DEEP // 2, DEEP // 4], 2)
    cv2.imwrite(str(tmp_path / "a.png"), deep[..., ::-1])
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb")
    tifffile.imwrite(tmp_path / "planes.tif", np.moveaxis(deep, 2, 0), photometric="rgb", planarconfig="separate")
    expected = np.rint(deep / 257).astype(np.uint8)
    for name in ("a.png", "a.tif", "planes.tif"):
        assert np.abs(read_image(tmp_path / name).astype(int) - expected).max() <= 1, name


def test_palettes_transparency_and_inverted_grey_become_colours(tmp_path: Path) -> None:
    Image.fromarray(RGB).quantize(8).save(tmp_path / "palette.png", transparency=b"\x00\x80")
    Image.fromarray(np.dstack([RGB, GREY])).save(tmp_path / "alpha.png")
    tifffile.imwrite(tmp_path / "inverted.tif", GREY, photometric="miniswhite")
    assert read_image(tmp_path / "palette.png").shape == RGB.shape
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), RGB)
    np.testing.assert_array_equal(read_image(tmp_path / "inverted.tif")[..., 0], 255 - GREY)


def broken(folder: Path) -> dict[str, str]:
    """Files that cannot be used, with what is said of each."""
    Image.fromarray(RGB).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "short.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not an image")
    (folder / "text.tif").write_text("not an image")
    tifffile.imwrite(folder / "pages.tif", np.stack([RGB, RGB, RGB]), photometric="rgb")
    tifffile.imwrite(folder / "float.tif", GREY.astype(np.float32))
    tifffile.imwrite(folder / "channels.tif", np.zeros((8, 8, 6), np.uint8), photometric="minisblack")
    return {
        "empty.png": "is empty (0 bytes)",
        "short.png": "cannot be read as an image",
        "text.jpg": "cannot be read as an image",
        "text.tif": "cannot be read as an image",
        "pages.tif": "holds 3 pages",
        "float.tif": "float32 samples",
        "channels.tif": "holds",
        "nowhere.png": "does not exist",
    }


def test_every_unusable_file_has_its_sentence(tmp_path: Path) -> None:
    for name, sentence in broken(tmp_path).items():
        with pytest.raises(InputError) as caught:
            read_image(tmp_path / name)
        assert sentence in str(caught.value), name
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_what_is_as_large_as_a_slide_is_refused(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_LARGEST", 500)
    Image.fromarray(RGB).save(tmp_path / f"slide{suffix}")
    with pytest.raises(InputError, match="30 x 20 pixels, too many"):
        read_image(tmp_path / f"slide{suffix}")
