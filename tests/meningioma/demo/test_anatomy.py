"""Distances are distances, and the parts of a head lie where they belong."""

import numpy as np
import pytest

from tasks.meningioma.demo import anatomy
from tasks.meningioma.demo.anatomy import Anatomy
from tasks.meningioma.demo.fields import SmoothField, capsule, common, cover, ellipsoid, sheet, union
from tasks.meningioma.demo.tumours import SITES, Tumour


def points(*at: tuple[float, float, float]) -> np.ndarray:
    return np.array(at, np.float32).T


def test_distances_to_balls_and_rods_are_exact() -> None:
    p = points((10, 0, 0), (0, 3, 0), (0, 0, 25))
    np.testing.assert_allclose(ellipsoid(p, (0, 0, 0), (5, 5, 5)), [5, -2, 20], atol=1e-4)
    np.testing.assert_allclose(capsule(p, (0, 0, -20), (0, 0, 20), 2), [8, 1, 3], atol=1e-5)


def test_union_and_intersection_are_round_near_the_seam_and_exact_away_from_it() -> None:
    a, b = np.array([0.0, 5.0, -9.0], np.float32), np.array([0.0, -5.0, 9.0], np.float32)
    np.testing.assert_allclose(union(a, b, 4), [-1, -5, -9])
    np.testing.assert_allclose(common(a, b, 4), [1, 5, 9])


def test_coverage_is_the_share_of_a_voxel() -> None:
    np.testing.assert_allclose(cover(np.array([-9, -1, 0, 0.5, 2], np.float32), 2.0), [1, 1, 0.5, 0.25, 0])
    assert sheet(np.zeros(1, np.float32), 1.0, 3.0)[0] == pytest.approx(1 / np.sqrt(10))
    # What a sheet adds along a line across it stays its thickness, whatever the voxel.
    across = np.linspace(-40, 40, 8001, dtype=np.float32)
    for width in (1.0, 3.0):
        assert sheet(across, 1.0, width).sum() * 0.01 == pytest.approx(0.5 * np.sqrt(np.pi), rel=1e-3)


def test_fields_repeat_and_have_unit_deviation() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(-100, 100, (3, 20000)).astype(np.float32)
    values = SmoothField.draw(np.random.default_rng(5), 12.0)(p)
    np.testing.assert_array_equal(values, SmoothField.draw(np.random.default_rng(5), 12.0)(p))
    assert abs(values.mean()) < 0.1 and 0.6 < values.std() < 1.1
    near = SmoothField.draw(np.random.default_rng(5), 12.0)(p + np.float32(0.5))
    assert np.corrcoef(values, near)[0, 1] > 0.98


def test_skin_encloses_skull_encloses_brain() -> None:
    p = np.random.default_rng(1).uniform(-110, 110, (3, 30000)).astype(np.float32)
    p = p[:, p[2] > -30]
    inside = anatomy.cavity(p) < 0
    assert inside.any()
    assert (anatomy.skin(p, 7, 6)[inside] < -7).all()
    ventricles, plexus = anatomy.ventricles(p, 1.0)
    assert (anatomy.cavity(p)[ventricles < 0] < 0).all()
    assert (ventricles[plexus < -1] < 3).all()


def test_the_intracranial_volume_is_an_adults() -> None:
    step = 2.0
    p = np.stack(np.meshgrid(*(np.arange(-110, 110, step, dtype=np.float32),) * 3, indexing="ij")).reshape(3, -1)
    p = p[:, p[2] > -65]
    volume = (anatomy.cavity(p) < 0).sum() * step**3 / 1000
    assert 1300 < volume < 1800


def test_falx_and_tentorium_are_sheets_in_the_skull() -> None:
    signed, distance = anatomy.falx(points((3, 0, 60), (-3, 0, 60), (3, 0, 5)))
    np.testing.assert_allclose(signed, [3, -3, 3])
    np.testing.assert_allclose(distance[:2], 3, atol=1e-5)
    assert distance[2] > 10  # no falx through the ventricles
    height, away = anatomy.tentorium(points((30, -50, 20), (30, -50, -30), (0, 40, 0)))
    assert height[0] > 0 > height[1] and away[2] > 40


def test_patients_differ_and_repeat() -> None:
    p = np.random.default_rng(1).uniform(-80, 80, (3, 500)).astype(np.float32)
    one, again, other = (Anatomy.draw(np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.to_average(p), again.to_average(p))
    assert np.abs(one.to_average(p) - other.to_average(p)).mean() > 1
    assert np.abs(one.to_average(p) - p).max() < 25


@pytest.mark.parametrize("site", SITES)
def test_a_tumour_grows_from_the_dura_of_its_site(site: str) -> None:
    tumour = Tumour.draw(np.random.default_rng([3, SITES.index(site)]), site, "bright", 5.0, ())
    anchor = np.array(tumour.anchor, np.float32)[:, None]
    assert anatomy.dura(anchor)[0] < 0.5
    np.testing.assert_allclose(tumour.frame @ tumour.frame.T, np.eye(3), atol=1e-5)
    inwards = anchor + 4 * tumour.frame[0][:, None]
    assert anatomy.cavity(inwards)[0] < -2
    cloud = anchor + np.random.default_rng(0).normal(0, 15, (3, 4000)).astype(np.float32)
    reach = tumour.radius_at(cloud)
    reached = np.isfinite(reach)
    assert (anatomy.cavity(cloud)[reached] < 0).all() and reached.mean() > 0.2
    assert tumour.radius_at(anchor - 3 * tumour.frame[0][:, None])[0] == np.inf  # not through the dura


def test_a_second_tumour_keeps_away_from_the_first() -> None:
    first = Tumour.draw(np.random.default_rng(1), "convexity", "bright", 20.0, ())
    second = Tumour.draw(np.random.default_rng(2), "convexity", "bright", 20.0, (first,))
    assert np.linalg.norm(np.subtract(first.anchor, second.anchor)) > 50
