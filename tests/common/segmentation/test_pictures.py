"""Slices are shown the right way round, at their true proportions, with outlines where the masks are."""

import subprocess
import sys

import nibabel
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from numpy.typing import NDArray

from kernels.errors import InputError
from tasks.common.plots import png_bytes
from tasks.common.segmentation.pictures import intensity_window, volume_figure, volume_montage

SPACING = np.array([2.0, 3.0, 5.0])


def made(codes: str = "RAS") -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Image, affine, reference and prediction of one and the same body, stored with the axes ``codes``.

    In RAS the image grows to the right, anterior and superior; the reference lies right, anterior and inferior.
    """
    shape = (20, 24, 16)
    x, y, z = np.indices(shape)
    image = 1 + x + 100.0 * y + 10000.0 * z
    reference = np.zeros(shape, np.uint8)
    reference[13:18, 16:21, 3:6] = 1
    reference[2, 2, 12] = 1  # a smaller piece
    prediction = np.roll(reference, 1, 0)
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = -SPACING * (np.array(shape) - 1) / 2
    ras = nibabel.Nifti1Image(image, affine)
    ornt = nibabel.orientations.axcodes2ornt(tuple(codes))
    turned = ras.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), ornt))
    to = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), ornt)
    return (
        np.asarray(turned.dataobj),
        turned.affine,
        nibabel.apply_orientation(reference, to),
        nibabel.apply_orientation(prediction, to),
    )


def letters(axes: Axes) -> dict[str, str]:
    at = {(0.02, 0.5): "left", (0.98, 0.5): "right", (0.5, 0.98): "top", (0.5, 0.02): "bottom"}
    return {at[t.get_position()]: t.get_text() for t in axes.texts if t.get_position() in at}


def positions(figure: Figure) -> list[str]:
    return [t.get_text() for axes in figure.axes for t in axes.texts if t.get_position() == (0.02, 0.02)]


def outlines(axes: Axes) -> list[NDArray]:
    return [p.get_path().vertices for p in axes.patches if isinstance(p, PathPatch)]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "SAL", "IRP"])
def test_every_orientation_gives_the_same_picture(codes: str) -> None:
    figure, expected = (volume_figure(*made(c)) for c in (codes, "RAS"))
    for axes, other in zip(figure.axes, expected.axes, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), other.images[0].get_array())
        assert letters(axes) == letters(other)
        for mine, theirs in zip(outlines(axes), outlines(other), strict=True):
            np.testing.assert_allclose(mine, theirs)
    assert positions(figure) == positions(expected)


def test_the_patients_right_is_on_the_left_and_superior_is_up() -> None:
    axial, coronal, sagittal = volume_figure(*made()).axes
    assert letters(axial) == {"left": "R", "right": "L", "top": "A", "bottom": "P"}
    assert letters(coronal) == {"left": "R", "right": "L", "top": "S", "bottom": "I"}
    assert letters(sagittal) == {"left": "A", "right": "P", "top": "S", "bottom": "I"}
    pixels = axial.images[0].get_array()
    assert pixels[0, 0] > pixels[0, -1] and pixels[0, 0] > pixels[-1, 0]  # bright to the right and anterior
    assert coronal.images[0].get_array()[0, 0] > coronal.images[0].get_array()[-1, 0]


def test_voxels_keep_their_proportions() -> None:
    axial, coronal, sagittal = volume_figure(*made()).axes
    for axes, (width, height) in ((axial, (40, 72)), (coronal, (40, 80)), (sagittal, (72, 80))):
        left, right, bottom, top = axes.images[0].get_extent()
        assert (right - left, bottom - top) == (width, height)
        assert axes.get_aspect() == 1


def test_slices_run_through_the_largest_piece_and_outline_it() -> None:
    figure = volume_figure(*made())
    assert positions(figure) == ["I 18 mm", "A 20 mm", "R 11 mm"]
    reference, prediction = outlines(figure.axes[0])
    # Right 13..17 of 20 at 2 mm lies 4 to 14 mm from the left of the picture; anterior 16..20 of 24 at 3 mm.
    assert (reference.min(axis=0).tolist(), reference.max(axis=0).tolist()) == ([4, 9], [14, 24])
    np.testing.assert_allclose(reference - prediction, [[2, 0]] * len(reference))


def test_the_legend_tells_volumes_in_ml() -> None:
    figure = volume_figure(*made(), title="case_7")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["Reference 2.28 ml", "Prediction 2.28 ml"]
    assert figure.get_suptitle() == "case_7"
    image, affine, reference, _ = made()
    assert [t.get_text() for t in volume_figure(image, affine, reference).legends[0].get_texts()] == texts[:1]
    assert volume_figure(image, affine).legends == []


def test_without_a_reference_the_prediction_is_sought_and_without_both_the_middle() -> None:
    image, affine, reference, _ = made()
    for empty in (np.zeros_like(reference), None):
        assert positions(volume_figure(image, affine, empty, reference)) == ["I 18 mm", "A 20 mm", "R 11 mm"]
    middle = volume_figure(image, affine, np.zeros_like(reference), np.zeros_like(reference))
    assert len(positions(middle)) == 3 and not outlines(middle.axes[0])


def test_a_tilted_volume_is_drawn_along_its_nearest_axes() -> None:
    image, affine, reference, prediction = made()
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    figure = volume_figure(image, turn @ affine, reference, prediction)
    assert letters(figure.axes[0]) == {"left": "R", "right": "L", "top": "A", "bottom": "P"}
    assert figure.legends[0].get_texts()[0].get_text() == "Reference 2.28 ml"


def test_a_montage_spreads_over_what_is_segmented() -> None:
    image, affine, reference, prediction = made()
    figure = volume_montage(image, affine, reference, prediction, count=4, columns=3)
    assert positions(figure) == ["S 22 mm", "S 8 mm", "I 8 mm", "I 22 mm"]
    assert len(figure.axes) == 4
    everywhere = volume_montage(image, affine, count=100, plane="coronal")
    assert len(everywhere.axes) == 24
    one = volume_montage(image, affine, count=1, plane="sagittal")
    assert len(one.axes) == 1


def test_a_single_voxel_and_a_single_slice_are_drawn() -> None:
    image = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    mask = np.zeros((2, 3, 1), bool)
    mask[1, 2, 0] = True
    for figure in (volume_figure(image, np.eye(4), mask), volume_montage(image, np.eye(4), mask)):
        assert png_bytes(figure, 40).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("shape", "affine", "reference", "message"),
    [
        ((4, 4), np.eye(4), None, r"shape \(4, 4\) cannot be drawn"),
        ((4, 4, 0), np.eye(4), None, r"cannot be drawn"),
        ((4, 4, 4), np.zeros((4, 4)), None, "invertible 4 x 4"),
        ((4, 4, 4), np.eye(3), None, "invertible 4 x 4"),
        ((4, 4, 4), np.eye(4), np.zeros((4, 4, 3)), r"reference has shape \(4, 4, 3\) and its image \(4, 4, 4\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    shape: tuple[int, ...], affine: NDArray, reference: NDArray | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        volume_figure(np.ones(shape), affine, reference)


def test_montage_options_are_checked() -> None:
    image, affine, *_ = made()
    with pytest.raises(InputError, match="Did you mean 'axial'"):
        volume_montage(image, affine, plane="axal")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 slices"):
        volume_montage(image, affine, count=0)


def test_windows_leave_out_background_and_what_is_no_number() -> None:
    image = np.zeros((10, 10, 10))
    image[:5] = np.linspace(100, 200, 500).reshape(5, 10, 10)
    image[0, 0, :2] = np.nan, np.inf
    low, high = intensity_window(image)
    assert 100 < low < 102 and 198 < high < 200
    assert intensity_window(np.zeros((3, 3, 3))) == (0, 1)
    assert intensity_window(np.full((3, 3), 7.0)) == (7, 8)


def test_drawing_needs_no_pyplot() -> None:
    code = "import sys, tasks.common.segmentation.overlays; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
