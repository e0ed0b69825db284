"""Micrometres per pixel from every place a scanner writes them, and never a guess."""

from pathlib import Path

import pytest

from kernels.errors import InputError
from tasks.wsi_mil.resolution import find_resolution, read_mpp_table

OME = '<OME><Image><Pixels PhysicalSizeX="{}" PhysicalSizeXUnit="{}" SizeX="10"/></Image></OME>'


@pytest.mark.parametrize(
    ("properties", "mpp"),
    [
        ({"openslide.mpp-x": "0.499", "openslide.mpp-y": "0.499"}, 0.499),
        ({"openslide.mpp-x": "0.4563", "openslide.mpp-y": "0.4552"}, 0.45575),
        ({"openslide.mirax.MPP": "0.23"}, 0.23),
        ({"mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X": "0.23"}, 0.23),
        ({"aperio.MPP": "0.2520"}, 0.252),
        ({"aperio.MPP": "0,2520"}, 0.252),
        ({"hamamatsu.XResolution": "0.2265"}, 0.2265),
        ({"hamamatsu.XResolution": "43960"}, 1e4 / 43960),
        ({"openslide.comment": "Aperio Image Library |AppMag = 40|MPP = 0.2497|Left = 1"}, 0.2497),
        ({"openslide.comment": OME.format("0.5", "µm")}, 0.5),
        ({"tiff.ImageDescription": OME.format("250", "nm")}, 0.25),
        ({"tiff.ImageDescription": '<Pixels PhysicalSizeX="0.325"/>'}, 0.325),
        ({"tiff.XResolution": "20000", "tiff.ResolutionUnit": "centimeter"}, 0.5),
        ({"tiff.XResolution": "101600", "tiff.ResolutionUnit": "inch"}, 0.25),
        ({"openslide.mpp-x": "352.77", "openslide.comment": "MPP = 0.5"}, 0.5),
    ],
)
def test_every_place_a_scanner_writes_its_resolution_is_read(properties: dict[str, str], mpp: float) -> None:
    assert find_resolution(properties, "a").mpp == pytest.approx(mpp, rel=1e-4)


def test_the_most_trustworthy_place_wins_and_is_named() -> None:
    found = find_resolution(
        {"tiff.XResolution": "10000", "tiff.ResolutionUnit": "centimeter", "aperio.MPP": "0.25"}, "a"
    )
    assert (found.mpp, found.source) == (0.25, "aperio.MPP")


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"openslide.objective-power": "40"},
        {"tiff.XResolution": "72", "tiff.ResolutionUnit": "inch"},
        {"tiff.XResolution": "96", "tiff.ResolutionUnit": "inch"},
        {"openslide.mpp-x": "264.58", "openslide.mpp-y": "264.58"},
        {"tiff.XResolution": "20000", "tiff.ResolutionUnit": "none"},
        {"tiff.XResolution": "20000"},
        {"openslide.mpp-x": "0", "aperio.MPP": "unknown"},
        {"openslide.comment": "40"},
        {"openslide.comment": OME.format("1", "pixel")},
    ],
)
def test_without_a_plausible_value_the_slide_is_refused_with_the_remedies(properties: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"slide 'S-1'.*data\.mpp_overrides=FILE.*data\.mpp_override"):
        find_resolution(properties, "S-1")


def test_a_default_of_72_dots_per_inch_is_named_as_passed_over() -> None:
    with pytest.raises(InputError, match=r"352\.8 µm per pixel, which no microscope has"):
        find_resolution({"tiff.XResolution": "72", "tiff.ResolutionUnit": "inch"}, "a")


def test_what_the_user_says_goes_before_the_header() -> None:
    assert find_resolution({"openslide.mpp-x": "0.5"}, "a", override=0.25).mpp == 0.25
    with pytest.raises(InputError, match=r"slide 'a'.*between 0\.02 and 20"):
        find_resolution({}, "a", override=-1.0)


@pytest.mark.parametrize("column", ["slide_id", "wsi"])
def test_a_table_of_resolutions_keeps_ids_as_strings(tmp_path: Path, column: str) -> None:
    path = tmp_path / "mpp.csv"
    path.write_text(f"{column},mpp\n007,0.25\nb.svs,0.5\n")
    assert read_mpp_table(path) == {"007": 0.25, "b.svs": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,mpp\na,0.5\n", "needs slide_id"),
        ("wsi,mpp\na,0.5\nb,fast\n", "line 3: mpp of 'b' is 'fast'"),
        ("wsi,mpp\na,400\n", "line 2: mpp of 'a' is '400'"),
        ("wsi,mpp\na,0.5\na,0.25\n", "line 3: slide 'a' has both mpp 0.5 and 0.25"),
        ("", "cannot be read as CSV"),
    ],
)
def test_a_bad_table_is_refused_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mpp.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_mpp_table(path)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.mpp_overrides=.*none\.csv cannot be read"):
        read_mpp_table(tmp_path / "none.csv")
