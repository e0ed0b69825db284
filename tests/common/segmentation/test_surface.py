"""Surfaces against closed forms, against MONAI where the definition is the same, and on the awkward masks."""

import math

import numpy as np
import pytest
import torch

from kernels.errors import InputError
from tasks.common.segmentation.surface import surface_distances, surface_metrics
from tasks.common.segmentation.surface_elements import element_sizes
from tests.common.segmentation.shapes import ball, blobs, box

SPACINGS = [(1.0, 1.0, 1.0), (0.8, 0.8, 3.0), (0.3, 2.0, 1.1)]


@pytest.mark.parametrize("spacing", [*SPACINGS, (1.0, 1.0), (0.4, 2.5)])
def test_the_areas_are_those_of_the_published_table(spacing: tuple[float, ...]) -> None:
    from monai.metrics.utils import get_code_to_measure_table

    published, _ = get_code_to_measure_table(spacing)
    assert element_sizes(spacing) == pytest.approx(published.numpy(), abs=2e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_cuboid_has_flat_faces_bevelled_edges_and_cut_corners(spacing: tuple[float, ...]) -> None:
    cuboid = box((9, 10, 11), (1, 5), (2, 8), (3, 5))
    found = surface_distances(cuboid, cuboid, spacing)
    a, b, c = spacing
    x, y, z = 3 * a, 5 * b, 1 * c  # between the outermost voxel centres
    edges = 4 * (x * math.hypot(b, c) + y * math.hypot(a, c) + z * math.hypot(a, b)) / 2
    corners = 8 * math.sqrt((b * c) ** 2 + (a * c) ** 2 + (a * b) ** 2) / 8
    assert found.reference_sizes.sum() == pytest.approx(2 * (x * y + y * z + x * z) + edges + corners)
    assert found.means() == (0, 0, 0)
    assert found.hausdorff() == 0
    assert found.surface_dice(0) == 1


def test_one_voxel_has_the_surface_of_an_octahedron() -> None:
    found = surface_distances(box((1, 1, 1), (0, 1)), box((1, 1, 1), (0, 1)), (1, 1, 1))
    assert found.reference_sizes.sum() == pytest.approx(math.sqrt(3))
    pixel = surface_distances(box((1, 1), (0, 1)), box((1, 1), (0, 1)), (1, 1))
    assert pixel.reference_sizes.sum() == pytest.approx(2 * math.sqrt(2))


@pytest.mark.parametrize("shift", [1, 4])
def test_a_shifted_plane_is_the_shift_away(shift: int) -> None:
    near, far = box((8, 8, 40), (0, 8), (0, 8), (0, 20)), box((8, 8, 40), (0, 8), (0, 8), (0, 20 + shift))
    found = surface_distances(far, near, (1, 1, 0.5))
    top = found.to_predicted > 0  # all of the near slab's upper face and none of its lower one
    assert found.hausdorff() == 0.5 * shift
    assert found.surface_dice(0.5 * shift) == 1
    assert set(found.to_predicted[top].tolist()) <= {0.5 * k for k in range(1, shift + 1)}


def test_concentric_spheres_are_the_difference_of_their_radii_apart() -> None:
    shape, centre = (49, 49, 49), (24.0, 24.0, 24.0)
    found = surface_metrics(ball(shape, centre, 20), ball(shape, centre, 15), (1, 1, 1), (3, 6))
    assert (
        4.4 < found["assd"] < 5
    )  # to the nearest of the cells that the other surface crosses, some of which are nearer
    assert found["hd100"] == pytest.approx(5, abs=0.6)
    assert (found["nsd_3mm"], found["nsd_6mm"]) == (0, 1)
    area = surface_distances(ball(shape, centre, 20), ball(shape, centre, 20), (1, 1, 1)).reference_sizes.sum()
    assert area == pytest.approx(4 * math.pi * 400, rel=0.1)  # a surface between voxels is a little rough


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy.*:FutureWarning")  # MONAI warns itself
@pytest.mark.parametrize("spacing", [*SPACINGS, (0.7, 1.9)])
def test_surface_dice_is_that_of_monai(spacing: tuple[float, ...]) -> None:
    from monai.metrics import compute_surface_dice

    shape = (13, 16, 11)[: len(spacing)]
    for seed in range(3):
        p, r = blobs(shape, seed), blobs(shape, seed + 10)
        pair = [torch.from_numpy(mask)[None, None].float() for mask in (p, r)]
        for tolerance in (0.5, 1.7):
            theirs = compute_surface_dice(
                *pair, [tolerance], include_background=True, spacing=spacing, use_subvoxels=True
            )
            ours = surface_distances(p, r, spacing).surface_dice(tolerance)
            assert ours == pytest.approx(theirs.item(), abs=1e-6)


def test_the_distances_are_those_of_a_direct_search_over_the_whole_grid() -> None:
    p, r, spacing = blobs((9, 7, 10), 4), blobs((9, 7, 10), 5), (0.8, 1.0, 2.5)
    found = surface_distances(p, r, spacing)
    places = []
    for mask in (r, p):
        framed = np.pad(mask, 1).astype(int)
        corners = [framed[i : i + 10, j : j + 8, k : k + 11] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
        places.append(np.argwhere((sum(corners) > 0) & (sum(corners) < 8)) * np.array(spacing))
    apart = np.linalg.norm(places[0][:, None] - places[1][None], axis=-1)
    assert found.to_predicted == pytest.approx(np.sort(apart.min(axis=1)))
    assert found.to_reference == pytest.approx(np.sort(apart.min(axis=0)))


def test_swapping_the_masks_swaps_the_directions_only() -> None:
    p, r = blobs((12, 9, 7), 1), blobs((12, 9, 7), 2)
    there, back = surface_metrics(p, r, (1, 2, 3)), surface_metrics(r, p, (1, 2, 3))
    assert there["asd_reference_to_predicted"] == pytest.approx(back["asd_predicted_to_reference"])
    same = ("nsd_1mm", "nsd_2mm", "hd95", "hd100", "assd")
    assert [there[name] for name in same] == pytest.approx([back[name] for name in same])


def test_place_and_orientation_of_the_masks_do_not_matter() -> None:
    p, r = blobs((8, 9, 7), 1), blobs((8, 9, 7), 2)
    expected = surface_metrics(p, r, (1, 2, 3))
    padding = ((5, 0), (0, 8), (3, 4))
    assert surface_metrics(np.pad(p, padding), np.pad(r, padding), (1, 2, 3)) == pytest.approx(expected)
    turned = surface_metrics(p.transpose(2, 0, 1)[::-1], r.transpose(2, 0, 1)[::-1], (3, 1, 2))
    assert turned == pytest.approx(expected)


def test_a_distance_of_the_tolerance_is_within_it_whatever_the_rounding() -> None:
    near, far = box((40, 4), (0, 10), (0, 4)), box((40, 4), (0, 13), (0, 4))
    assert surface_distances(far, near, (0.1, 0.1)).surface_dice(0.3) == 1  # three steps are 0.30000000000000004


@pytest.mark.parametrize(
    ("predicted", "reference", "empty"), [(0, 0, "both"), (1, 0, "reference"), (0, 1, "predicted")]
)
def test_empty_masks_are_undefined_but_for_the_surface_dice_of_one(predicted: int, reference: int, empty: str) -> None:
    p, r = np.full((4, 5, 6), bool(predicted)), np.full((4, 5, 6), bool(reference))
    found = surface_metrics(p, r, (1, 1, 1))
    assert surface_distances(p, r, (1, 1, 1)).empty == empty
    surface_dice = [found.pop("nsd_1mm"), found.pop("nsd_2mm")]
    assert surface_dice == pytest.approx([float("nan") if empty == "both" else 0] * 2, nan_ok=True)
    assert all(math.isnan(value) for value in found.values())


def test_percentiles_weigh_by_area() -> None:
    p, r = blobs((10, 11, 12), 7), blobs((10, 11, 12), 8)
    found = surface_distances(p, r, (1, 1, 2))
    for percent in (50, 95):
        limit = found.hausdorff(percent)
        for distances, sizes in (
            (found.to_predicted, found.reference_sizes),
            (found.to_reference, found.predicted_sizes),
        ):
            assert sizes[distances <= limit].sum() >= percent / 100 * sizes.sum() - 1e-9


@pytest.mark.parametrize(
    ("shape", "spacing", "message"),
    [
        ((4, 4, 5), (1, 1, 1), "one shape"),
        ((4, 4, 4), (1, 1), "3 positive lengths"),
        ((4, 4, 4), (1, 0, 1), "positive lengths"),
    ],
)
def test_bad_input_is_one_sentence(shape: tuple[int, ...], spacing: tuple[float, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        surface_metrics(np.ones((4, 4, 4)), np.ones(shape), spacing)


def test_nan_and_bad_limits_are_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        surface_metrics(np.full((2, 2), np.nan), np.ones((2, 2)), (1, 1))
    found = surface_distances(np.ones((2, 2)), np.ones((2, 2)), (1, 1))
    with pytest.raises(InputError, match="tolerance"):
        found.surface_dice(-1)
    with pytest.raises(InputError, match="percentile"):
        found.hausdorff(101)
