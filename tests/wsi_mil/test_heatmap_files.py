"""What the files hold when other programs open them."""

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import openslide
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from kernels.errors import InputError
from tasks.wsi_mil.heatmap import overlay, rasterise
from tasks.wsi_mil.heatmap_files import (
    write_figure,
    write_geojson,
    write_image,
    write_pyramid,
    write_scores,
    write_scores_csv,
)


def test_an_image_comes_back_as_it_was(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (17, 33, 3), dtype=np.uint8)
    write_image(tmp_path / "a.png", image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)


def test_a_figure_is_written_in_the_format_of_its_suffix(tmp_path: Path) -> None:
    figure = Figure(figsize=(1, 1))
    write_figure(tmp_path / "a.png", figure)
    write_figure(tmp_path / "a.pdf", figure)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png"], "a temporary file was left"


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097])
def test_geojson_holds_one_qupath_tile_for_each_tile(tmp_path: Path, count: int) -> None:
    rng = np.random.default_rng(count)
    xy = rng.integers(0, 3_000_000_000, (count, 2))
    scores = {"Attention": rng.random(count), 'odd "name" 50%': 10.0 ** rng.uniform(-30, 9, count)}
    colours = rng.integers(0, 256, (count, 3), dtype=np.uint8)
    write_geojson(tmp_path / "tiles.geojson", xy, 448, scores, colours)
    collection = json.loads((tmp_path / "tiles.geojson").read_text())
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == count
    for i in rng.integers(0, count, min(count, 50)):
        feature = collection["features"][i]
        x, y = xy[i].tolist()
        assert feature["type"] == "Feature"
        assert feature["geometry"] == {
            "type": "Polygon",
            "coordinates": [[[x, y], [x + 448, y], [x + 448, y + 448], [x, y + 448], [x, y]]],
        }
        assert feature["properties"]["objectType"] == "tile"
        assert feature["properties"]["color"] == colours[i].tolist()
        assert feature["properties"]["measurements"] == pytest.approx({k: v[i] for k, v in scores.items()}, rel=1e-5)


def test_geojson_without_colours_names_none(tmp_path: Path) -> None:
    write_geojson(tmp_path / "t.geojson", np.array([[1, 2]]), 3, {"Attention": np.array([0.5])})
    properties = json.loads((tmp_path / "t.geojson").read_text())["features"][0]["properties"]
    assert properties == {"objectType": "tile", "measurements": {"Attention": 0.5}}


def test_a_measurement_json_cannot_carry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'Attention' holds a value that is not finite"):
        write_geojson(tmp_path / "t.geojson", np.array([[1, 2]]), 3, {"Attention": np.array([np.nan])})
    assert not list(tmp_path.iterdir())


def test_scores_come_back_from_hdf5_and_csv(tmp_path: Path) -> None:
    xy = np.array([[0, 5], [100_000, 7]])
    scores = {"attention": np.array([0.25, 0.75]), "branch_1": np.array([1e-9, 1.0])}
    write_scores(tmp_path / "s.h5", xy, 512, scores, {"slide_id": "a", "mpp": 0.5, "tiles": {"tile": 224}})
    with h5py.File(tmp_path / "s.h5") as file:
        np.testing.assert_array_equal(file["coords"][:], xy)
        assert file["coords"].attrs["patch_size_level0"] == 512
        np.testing.assert_allclose(file["branch_1"][:], scores["branch_1"], rtol=1e-6)
        assert file.attrs["slide_id"] == "a" and json.loads(file.attrs["tiles"]) == {"tile": 224}
    write_scores_csv(tmp_path / "s.csv", xy, 512, scores)
    table = pd.read_csv(tmp_path / "s.csv")
    assert list(table) == ["tile", "x", "y", "size", "attention", "branch_1"]
    assert table.loc[1].tolist() == [1, 100_000, 7, 512, 0.75, 1.0]
    write_scores_csv(tmp_path / "no_coords.csv", None, None, scores)
    assert list(pd.read_csv(tmp_path / "no_coords.csv")) == ["tile", "attention", "branch_1"]


class PaintedSlide:
    """A slide held in memory with the reading contract of ``Slide.read_region``, for whole downsamples."""

    def __init__(self, width: int, height: int) -> None:
        y, x = np.mgrid[:height, :width]
        self.size = (width, height)
        self.pixels = np.stack([200 + 0 * x, 255 * x // width, 255 * y // height], -1).astype(np.uint8)

    def read_region(self, x: int, y: int, width: int, height: int, downsample: float) -> np.ndarray:
        step = round(downsample)
        return self.pixels[y : y + height : step, x : x + width : step]


def rows_of(heat: np.ndarray) -> Callable[[int, int], np.ndarray]:
    return lambda top, bottom: heat[top:bottom]


@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
@pytest.mark.parametrize("size", [(3001, 2051), (1030, 4097), (300, 200)])
def test_the_pyramid_opens_in_openslide_at_the_right_scale(
    tmp_path: Path, compression: str, size: tuple[int, int]
) -> None:
    slide = PaintedSlide(*size)
    rng = np.random.default_rng(0)
    xy = np.array([(x, y) for y in range(0, size[1], 120) for x in range(0, size[0], 120) if (x + y) % 360])
    heat = rasterise(rng.random(len(xy)), xy, 120, size, 2)
    path = tmp_path / "overlay.tiff"
    write_pyramid(
        path,
        slide.read_region,
        size,
        rows_of(heat),
        2,
        0.25,
        compression=compression,
        description="Präparat 7: 0.9 ± 0.1",
    )
    expected = overlay(slide.read_region(0, 0, 2 * heat.shape[1], 2 * heat.shape[0], 2)[: heat.shape[0]], heat)
    with openslide.OpenSlide(path) as opened:
        width, height = opened.dimensions
        assert (height, width) == heat.shape
        assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        assert float(opened.properties["openslide.mpp-y"]) == pytest.approx(0.5)
        assert max(opened.level_dimensions[-1]) <= 512
        np.testing.assert_allclose(opened.level_downsamples, 2.0 ** np.arange(opened.level_count), rtol=0.01)
        got = np.asarray(opened.read_region((0, 0), 0, (width, height)))[..., :3].astype(int)
        difference = np.abs(got - expected[:height, :width])
        assert difference.max() == 0 if compression == "deflate" else difference.mean() < 3
        # A coarser level shows the same picture, and in the right place.
        for level in range(1, opened.level_count):
            small = np.asarray(opened.read_region((0, 0), level, opened.level_dimensions[level]))[..., :3]
            back = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR))
            # Away from the edges of tiles, where a coarse level cannot follow.
            assert np.median(np.abs(back.astype(int) - expected)) <= 6
        assert opened.properties["tiff.ImageDescription"] == "Präparat 7: 0.9 ± 0.1"


def test_a_pyramid_without_resolution_states_none(tmp_path: Path) -> None:
    slide = PaintedSlide(600, 400)
    heat = np.full((400, 600), np.nan, np.float32)
    write_pyramid(tmp_path / "o.tiff", slide.read_region, (600, 400), rows_of(heat), 1, None, compression="deflate")
    with openslide.OpenSlide(tmp_path / "o.tiff") as opened:
        assert "openslide.mpp-x" not in opened.properties
        np.testing.assert_array_equal(np.asarray(opened.read_region((0, 0), 0, (600, 400)))[..., :3], slide.pixels)


def test_a_slide_that_fails_midway_leaves_no_file(tmp_path: Path) -> None:
    def fail_below(x: int, y: int, width: int, height: int, downsample: float) -> np.ndarray:
        if y > 0:
            raise InputError("slide 's.svs' is cut short")
        return np.zeros((height, width, 3), np.uint8)

    with pytest.raises(InputError, match="cut short"):
        write_pyramid(tmp_path / "o.tiff", fail_below, (600, 700), rows_of(np.zeros((700, 600))), 1, 0.5)
    assert not list(tmp_path.iterdir())
