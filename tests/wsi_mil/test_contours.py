"""Outlines survive GeoJSON, masks and drawing."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from kernels.errors import InputError
from tasks.common.contours import Contour, rasterise, read_geojson
from tasks.wsi_mil.contours import draw_contours, write_geojson, write_jpeg

SQUARE = np.array([[100, 100], [900, 100], [900, 700], [100, 700]], np.int32)
HOLE = np.array([[300, 300], [500, 300], [500, 500], [300, 500]], np.int32)


def test_outlines_come_back_from_geojson_point_by_point(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    write_geojson(path, [Contour(SQUARE, [HOLE]), Contour(HOLE + 1000)])
    kept, excluded = read_geojson(path)
    assert excluded == []
    np.testing.assert_array_equal(kept[0].outline, SQUARE)
    np.testing.assert_array_equal(kept[0].holes[0], HOLE)
    np.testing.assert_array_equal(kept[1].outline, HOLE + 1000)
    assert kept[0].area == 800 * 600 - 200 * 200


def test_the_file_is_what_qupath_opens(tmp_path: Path) -> None:
    write_geojson(tmp_path / "a.geojson", [Contour(SQUARE)])
    (feature,) = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert feature["properties"]["objectType"] == "annotation"
    assert feature["properties"]["classification"]["name"] == "Tissue"
    ring = feature["geometry"]["coordinates"][0]
    assert ring[0] == ring[-1] == [100, 100]
    assert len(ring) == 5


def test_what_qupath_exports_is_read(tmp_path: Path) -> None:
    ring = [[0.5, 0.5], [10.25, 0.5], [10.25, 10.5], [0.5, 0.5]]
    polygon = {"type": "Polygon", "coordinates": [ring]}
    features = [
        {"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": [[ring], [ring]]}, "properties": {}},
        {"type": "Feature", "geometry": polygon, "properties": {"classification": {"name": "Ignore*"}}},
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 1]}, "properties": None},
        {"type": "Feature", "geometry": {"type": "GeometryCollection", "geometries": [polygon]}},
    ]
    for content in (features, {"type": "FeatureCollection", "features": features}):
        (tmp_path / "q.geojson").write_text(json.dumps(content))
        kept, excluded = read_geojson(tmp_path / "q.geojson")
        assert (len(kept), len(excluded)) == (3, 1)
        np.testing.assert_array_equal(kept[0].outline, ring[:-1])
    (tmp_path / "q.geojson").write_text(json.dumps(polygon))
    assert len(read_geojson(tmp_path / "q.geojson")[0]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as GeoJSON"),
        ('{"type": "FeatureCollection", "features": []}', "has no polygon"),
        ('{"type": "FeatureCollection"}', "not the GeoJSON of polygons"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}', "fewer than three points"),
        ('[{"type": "Feature", "geometry": 3}]', "not the GeoJSON of polygons"),
    ],
)
def test_a_broken_geojson_is_refused_with_its_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.geojson"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_geojson(path)
    assert "bad.geojson" in str(caught.value)


def test_a_mask_has_the_area_of_the_outline_less_its_hole() -> None:
    mask = rasterise([Contour(SQUARE, [HOLE])], (100, 100), (10.0, 10.0))
    assert mask.sum() == pytest.approx(80 * 60 - 20 * 20, rel=0.06)
    assert mask[15, 15] and not mask[40, 40] and not mask[80, 50]


def test_a_piece_inside_the_hole_of_another_stays_in_the_mask() -> None:
    island = np.array([[380, 380], [420, 380], [420, 420], [380, 420]])
    mask = rasterise([Contour(island), Contour(SQUARE, [HOLE])], (100, 100), (10.0, 10.0))
    assert mask[40, 40] and not mask[32, 32]


def test_outlines_are_drawn_where_they_are_and_the_thumbnail_is_left_alone() -> None:
    thumbnail = np.full((400, 500, 3), 250, np.uint8)
    drawn = draw_contours(thumbnail, [Contour(SQUARE, [HOLE])], 2.0, 0.5)
    assert (thumbnail == 250).all()
    changed = (drawn != 250).any(axis=2)
    assert changed[50, 100:400].all()
    assert changed[150, 160:240].all()
    assert not changed[80:120, 80:120].any()
    bar = np.flatnonzero((drawn[-30:] == 0).all(axis=2).sum(axis=0) > 1)
    assert np.ptp(bar) + 1 == 100  # 100 µm at 1 µm per pixel of the thumbnail


def test_tiny_thumbnails_are_drawn_without_a_scale_bar() -> None:
    drawn = draw_contours(np.full((3, 4, 3), 250, np.uint8), [], 1.0, 0.5)
    assert (drawn == 250).all()


def test_a_jpeg_is_written_with_its_colours(tmp_path: Path) -> None:
    image = np.full((32, 32, 3), (200, 60, 20), np.uint8)
    write_jpeg(tmp_path / "a.jpg", image)
    read = cv2.imread(str(tmp_path / "a.jpg"))
    assert read is not None
    assert np.abs(read[16, 16, ::-1].astype(int) - (200, 60, 20)).max() < 6
