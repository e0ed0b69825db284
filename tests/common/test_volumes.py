"""Volumes are read with the geometry their headers say, and results lie exactly on their inputs."""

import gzip
from pathlib import Path

import nibabel as nib
import nibabel.processing
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from kernels.errors import InputError
from tasks.common.volumes.geometry import Grid, closest_ras, is_rearrangement, resample, with_spacing, world_aligned
from tasks.common.volumes.reading import read_label, read_volume
from tasks.common.volumes.volume import Volume, stem_of, suffix_of
from tasks.common.volumes.writing import write_mask, write_probabilities
from tests.common.made_volumes import VARIANTS, affine_of, centred, made, nifti_variant

ITK_READS = [v for v in VARIANTS if v not in ("sheared", "neither", "4d")]


def grid_of(image: sitk.Image) -> np.ndarray:
    """RAS affine of an ITK image, point by point, by ITK's own arithmetic."""
    affine = np.eye(4)
    origin = np.array(image.TransformIndexToPhysicalPoint((0, 0, 0)))
    affine[:3, 3] = origin
    for axis in range(3):
        step = [0, 0, 0]
        step[axis] = 1
        affine[:3, axis] = np.array(image.TransformIndexToPhysicalPoint(step)) - origin
    return np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize("kind", VARIANTS)
def test_intensities_and_affine_are_nibabels_and_itks(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    nib.save(nifti_variant(kind), path)
    image, volume = nib.load(path), read_volume(path)
    assert volume.data.dtype == np.float32 and volume.data.ndim == 3
    np.testing.assert_allclose(volume.data, image.get_fdata().reshape(volume.data.shape), rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(volume.affine, image.affine)
    np.testing.assert_allclose(volume.spacing, np.linalg.norm(image.affine[:3, :3], axis=0))
    if kind in ITK_READS:
        np.testing.assert_allclose(volume.affine, grid_of(sitk.ReadImage(str(path))), atol=2e-4)


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd", ".hdr"])
def test_other_formats_give_the_same_volume(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    nib.save(nifti_variant("oblique"), path)
    other = tmp_path / f"a{suffix}"
    if suffix == ".hdr":
        nib.save(nib.Nifti1Pair.from_image(nib.load(path)), other)
    else:
        sitk.WriteImage(sitk.ReadImage(str(path)), str(other))
    a, b = read_volume(path), read_volume(other)
    np.testing.assert_array_equal(a.data, b.data)
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-5)
    assert a.grid.same_as(b.grid)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_a_mask_has_the_inputs_shape_affine_and_codes(kind: str, suffix: str, tmp_path: Path) -> None:
    source = tmp_path / "in" / "a.nii.gz"
    source.parent.mkdir()
    nib.save(nifti_variant(kind), source)
    volume = read_volume(source)
    mask = (volume.data > 600).astype(np.int64)
    path = write_mask(tmp_path / "out" / f"mask{suffix}", mask, volume)
    before, after = nib.load(source), nib.load(path)
    assert after.shape == before.shape[:3]
    assert after.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(after.dataobj), mask)
    np.testing.assert_allclose(after.affine, before.affine, atol=1e-6)
    for field in ("qform_code", "sform_code", "xyzt_units"):
        assert after.header[field] == before.header[field]
    np.testing.assert_allclose(after.header["pixdim"][:4], before.header["pixdim"][:4])
    assert (after.dataobj.slope, after.dataobj.inter) == (1, 0)
    if kind in ITK_READS:
        itk, original = sitk.ReadImage(str(path)), sitk.ReadImage(str(source))
        np.testing.assert_allclose(grid_of(itk), grid_of(original), atol=1e-6)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_same_mask_gives_the_same_bytes(tmp_path: Path) -> None:
    volume = Volume(made(Grid((9, 8, 7), np.eye(4)))[0], np.eye(4), tmp_path / "in" / "a.nii")
    mask = (volume.data > 2).astype(np.uint8)
    files = [write_mask(tmp_path / name / "m.nii.gz", mask, volume).read_bytes() for name in "xy"]
    assert files[0] == files[1]


def test_other_inputs_and_formats_of_results(tmp_path: Path) -> None:
    grid = Grid((9, 8, 7), centred(affine_of("LPS", (1, 2, 3), 0.2), (9, 8, 7)))
    volume = Volume(np.ones(grid.shape, np.float32), grid.affine, tmp_path / "in" / "a.nrrd")
    mask = np.zeros(grid.shape, np.uint16)
    mask[1, 2, 3] = 300
    for suffix in (".nii.gz", ".nrrd", ".mha"):
        again = read_label(write_mask(tmp_path / f"m{suffix}", mask, volume))
        np.testing.assert_array_equal(again.data, mask)
        np.testing.assert_allclose(again.affine, grid.affine, atol=1e-5)
    header = nib.load(tmp_path / "m.nii.gz").header
    assert (header["qform_code"], header["sform_code"], header.get_xyzt_units()[0]) == (1, 1, "mm")
    values = np.random.default_rng(0).random((3, *grid.shape), np.float32)
    stored = nib.load(write_probabilities(tmp_path / "p.nii.gz", values, volume))
    assert stored.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.moveaxis(stored.get_fdata(dtype=np.float32), -1, 0), values)
    np.testing.assert_array_equal(
        read_volume(write_probabilities(tmp_path / "p1.nrrd", values[1], volume)).data, values[1]
    )
    with pytest.raises(InputError, match="as NIfTI only"):
        write_probabilities(tmp_path / "p.nrrd", values, volume)
    with pytest.raises(InputError, match="give one of these suffixes"):
        write_mask(tmp_path / "m.png", mask, volume)
    with pytest.raises(ValueError, match="whole numbers"):
        write_mask(tmp_path / "m.nii", mask.astype(float), volume)
    with pytest.raises(ValueError, match="for a volume of"):
        write_mask(tmp_path / "m.nii", mask[1:], volume)


def test_nothing_is_written_beside_the_input(tmp_path: Path) -> None:
    source = tmp_path / "a.nii.gz"
    nib.save(nifti_variant("LAS"), source)
    before = source.read_bytes()
    volume = read_volume(source)
    mask = np.zeros(volume.grid.shape, np.uint8)
    for name in ("a.nii.gz", "b.nii.gz", "sub/../b.nii.gz"):
        with pytest.raises(InputError, match="choose another folder"):
            write_mask(tmp_path / name, mask, volume)
    assert source.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path: Path) -> None:
    data = made(Grid((9, 8, 7), np.eye(4)))[0]
    bad: dict[str, Path] = {}
    bad["does not exist"] = tmp_path / "no.nii.gz"
    (tmp_path / "e.nii.gz").write_bytes(b"")
    bad[r"empty \(0 bytes\)"] = tmp_path / "e.nii.gz"
    (tmp_path / "a.txt").write_text("x")
    bad["not in a volume format"] = tmp_path / "a.txt"
    (tmp_path / "t.nii").write_text("no volume at all")
    bad["t.nii cannot be read as a volume"] = tmp_path / "t.nii"
    whole = save(tmp_path / "w.nii.gz", np.random.default_rng(0).random((30, 30, 30), np.float32)).read_bytes()
    (tmp_path / "w.nii.gz").write_bytes(whole[: len(whole) // 2])
    bad["w.nii.gz cannot be read as a volume"] = tmp_path / "w.nii.gz"
    plain = save(tmp_path / "p.nii", data).read_bytes()
    (tmp_path / "p.nii").write_bytes(plain[:-50])
    bad["p.nii cannot be read as a volume"] = tmp_path / "p.nii"
    hole = data.copy()
    hole[0, 0, :2] = np.nan
    bad["2 NaN or infinite"] = save(tmp_path / "n.nii", hole)
    hole[0, 0, :2] = np.inf
    bad["i.nii holds 2 NaN or infinite"] = save(tmp_path / "i.nii", hole)
    bad["only zeros"] = save(tmp_path / "z.nii", data * 0)
    bad["the same value 7 everywhere"] = save(tmp_path / "c.nii", data * 0 + 7)
    bad["has three axes"] = save(tmp_path / "2.nii", data[0])
    bad["shape 9 x 8 x 1"] = save(tmp_path / "1.nii", data[..., :1])
    bad["last one has 4 volumes.*channel=0 to 3"] = save(tmp_path / "4.nii", np.stack([data] * 4, -1))
    bad["singular"] = save(
        tmp_path / "s.nii", data, np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    )
    colour = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    bad["colour voxels"] = save(tmp_path / "rgb.nii", colour)
    bad["complex voxels"] = save(tmp_path / "x.nii", data.astype(np.complex64))
    small = nib.Nifti1Image(data, np.eye(4))
    small.header.set_xyzt_units("micron")
    nib.save(small, tmp_path / "micron.nii")
    bad["lengths in micron"] = tmp_path / "micron.nii"
    for spacing, name in ((0.0, "zero"), (-1.0, "negative"), (np.nan, "nan")):
        path = save(tmp_path / f"{name}.nii", data)
        content = bytearray(path.read_bytes())
        content[80:84] = np.float32(spacing).tobytes()  # pixdim[1]
        path.write_bytes(content)
        bad[f"{name}.nii.*must be positive|{name}.nii cannot be read"] = path
    for sentence, path in bad.items():
        with pytest.raises(InputError, match=sentence) as raised:
            read_volume(path)
        assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    chosen = read_volume(bad["last one has 4 volumes.*channel=0 to 3"], channel=2)
    np.testing.assert_array_equal(chosen.data, data)
    with pytest.raises(InputError, match="channel=4"):
        read_volume(tmp_path / "4.nii", channel=4)


def test_labels_are_whole_numbers(tmp_path: Path) -> None:
    values = np.zeros((5, 6, 7), np.float32)
    values[1, 2, 3], values[2, 2, 2] = 530, 3
    label = read_label(save(tmp_path / "f.nii.gz", values))
    assert label.data.dtype == np.uint16
    np.testing.assert_array_equal(label.data, values)
    assert read_label(save(tmp_path / "0.nii", values * 0)).data.dtype == np.uint8
    large = np.zeros((5, 6, 7), np.int32)
    large[0, 0, :2] = 2**24 + 1, 2**24
    np.testing.assert_array_equal(read_label(save(tmp_path / "l.nii", large)).data, large)
    with pytest.raises(InputError, match=r"holds 2\.5, which is not a whole number"):
        read_label(save(tmp_path / "p.nii", np.where(values == 3, np.float32(2.5), values)))
    with pytest.raises(InputError, match="negative label -1"):
        read_label(save(tmp_path / "m.nii", values - 1))


def test_resampling_is_nibabels_and_rearranging_keeps_every_bit() -> None:
    source = Grid((12, 9, 10), centred(affine_of("LPS", (1.0, 2.0, 3.0), 0.3), (12, 9, 10)))
    values = np.random.default_rng(0).random(source.shape, np.float32)
    target = world_aligned(source, (1.5, 1.5, 1.5))
    image = nib.Nifti1Image(values, source.affine)
    ours = resample(values, source, target)
    theirs = nibabel.processing.resample_to_output(image, (1.5, 1.5, 1.5), order=1)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(theirs.affine, target.affine)
    rim = np.pad(np.ones(np.array(target.shape) - 2, bool), 1)
    np.testing.assert_allclose(ours[rim], theirs.get_fdata()[rim], atol=1e-4)
    turned = closest_ras(source)
    assert turned.orientation == "RAS" and is_rearrangement(turned, source)
    labels = np.random.default_rng(1).integers(0, 9, source.shape)
    moved = resample(labels, source, turned)
    assert moved.dtype == labels.dtype
    reference = nib.as_closest_canonical(nib.Nifti1Image(labels, source.affine, dtype=np.int64))
    np.testing.assert_array_equal(moved, np.asarray(reference.dataobj))
    np.testing.assert_array_equal(resample(moved, turned, source), labels)


def test_a_box_beyond_the_grid_is_filled_or_repeated() -> None:
    grid = Grid((4, 5, 6), affine_of("LPS"))
    values = np.random.default_rng(0).random(grid.shape)
    for low, size in (
        ((-2, 1, -1), (9, 3, 8)),
        ((7, 0, 0), (2, 5, 6)),
        ((-9, 0, 0), (3, 5, 6)),
        ((0, 0, 0), (4, 5, 6)),
    ):
        box = grid.part(low, size)
        index = np.stack(np.meshgrid(*(np.arange(n) + f for f, n in zip(low, size, strict=True)), indexing="ij"))
        for border in ("constant", "nearest"):
            expected = ndimage.map_coordinates(values, index, order=0, mode=border, cval=-1)
            np.testing.assert_array_equal(resample(values, grid, box, border=border, fill=-1), expected)
            nearly = Grid(box.shape, box.affine.copy())
            nearly.affine[:3, 3] += 1e-9  # of rounding: still the same lattice
            np.testing.assert_array_equal(resample(values, grid, nearly, border=border, fill=-1), expected)


def test_a_new_spacing_keeps_the_field_of_view() -> None:
    grid = Grid((10, 12, 7), centred(affine_of("RAS", (1.0, 1.0, 3.0), 0.2), (10, 12, 7)))
    new = with_spacing(grid, (0.5, 2.0, 1.0))
    assert new.shape == (20, 6, 21)
    np.testing.assert_allclose(new.spacing, (0.5, 2.0, 1.0))
    np.testing.assert_allclose(new.affine @ [9.5, 2.5, 10, 1], grid.affine @ [4.5, 5.5, 3, 1], atol=1e-9)
    assert with_spacing(grid, (50.0, 50.0, 50.0)).shape == (1, 1, 1)
    assert grid.voxel_ml == pytest.approx(0.003)
    again = Grid.from_dict(new.as_dict())
    assert again.shape == new.shape and np.array_equal(again.affine, new.affine)


def test_names() -> None:
    assert suffix_of(Path("a/B.NII.GZ")) == ".nii.gz" and stem_of(Path("a/B.NII.GZ")) == "B"
    assert suffix_of(Path("a/.nii.gz")) is None and suffix_of(Path("a/b.gz")) is None
    assert stem_of(Path("x.1.nrrd")) == "x.1"


def test_real_files_agree_with_nibabel_and_itk(shared_data: Path) -> None:
    folder = shared_data / "nifti"
    for path in ("misc/someones_anatomy.nii.gz", "misc/nnunet_example_ct_sm.nii.gz", "misc/ch2.nii.gz"):
        volume, image = read_volume(folder / path), nib.load(folder / path)
        np.testing.assert_allclose(volume.data, image.get_fdata(dtype=np.float32), rtol=1e-5)
        np.testing.assert_array_equal(volume.affine, image.affine)
    image_path, label_path = (folder / "pyradiomics" / f"brain1_{what}.nrrd" for what in ("image", "label"))
    volume, label = read_volume(image_path), read_label(label_path)
    itk = sitk.ReadImage(str(image_path))
    np.testing.assert_allclose(volume.affine, grid_of(itk), atol=1e-9)
    assert volume.data[10, 20, 5] == itk[10, 20, 5] and volume.grid.orientation == "LAS"
    assert volume.grid.same_as(label.grid) and int(label.data.sum()) == 4137


def test_a_cut_archive_never_passes_for_a_volume(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(0).random((20, 20, 20), np.float32))
    whole = path.read_bytes()
    for share in (0.01, 0.3, 0.9, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError, match="cannot be read as a volume"):
            read_volume(path)
    path.write_bytes(gzip.compress(b"not a volume" * 100))
    with pytest.raises(InputError, match="cannot be read as a volume"):
        read_volume(path)
