"""DICOM series are read in the order of their slices, and segmentations go back to the very same voxels."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from kernels.errors import InputError
from tasks.common.volumes.dicom_seg import write_dicom_seg
from tasks.common.volumes.geometry import Affine
from tasks.common.volumes.reading import read_volume
from tasks.common.volumes.volume import Volume
from tests.common.made_volumes import affine_of

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_series(
    folder: Path,
    values: np.ndarray,
    affine: Affine,
    uid: str | None = None,
    description: str = "T1 post",
    skip: tuple[int, ...] = (),
    name: str = "",
    **changes: Any,
) -> str:
    """Slices of (columns, rows, slices) int16 with a rescale slope that differs from slice to slice."""
    folder.mkdir(parents=True, exist_ok=True)
    uid, study, frame = uid or generate_uid(), generate_uid(), generate_uid()
    world = LPS @ affine
    spacing = np.linalg.norm(world[:3, :3], axis=0)
    order = np.random.default_rng(0).permutation(values.shape[2])  # neither names nor numbers are the order
    for number, k in enumerate(order):
        if k in skip:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"{name}{number:03d}.dcm"
        one = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        one.SOPClassUID, one.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        one.SeriesInstanceUID, one.StudyInstanceUID, one.FrameOfReferenceUID = uid, study, frame
        one.PatientName, one.PatientID, one.PatientBirthDate, one.PatientSex = "A^B", "7", "", ""
        one.StudyDate = one.StudyTime = one.AccessionNumber = one.StudyID = one.ReferringPhysicianName = ""
        one.PositionReferenceIndicator, one.Manufacturer = "", "none"
        one.Modality, one.SeriesDescription, one.SeriesNumber, one.InstanceNumber = "CT", description, 3, number + 1
        one.Rows, one.Columns = values.shape[1], values.shape[0]
        one.PixelSpacing = [f"{spacing[1]:.8g}", f"{spacing[0]:.8g}"]
        one.SliceThickness = f"{spacing[2]:.8g}"
        direction = (world[:3, :3] / spacing)[:, :2].T.ravel()
        one.ImageOrientationPatient = [f"{v:.12g}"[:16] for v in direction]
        one.ImagePositionPatient = [f"{v:.10g}"[:16] for v in (world @ [0, 0, k, 1])[:3]]
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated = one.BitsStored = 16
        one.HighBit, one.PixelRepresentation = 15, 1
        one.RescaleSlope, one.RescaleIntercept = str(0.5 + int(k)), "-10"
        one.PixelData = np.ascontiguousarray(values[:, :, k].T).tobytes()
        for field, value in changes.items():
            if number == 0:
                setattr(one, field, value)
        one.save_as(path, enforce_file_format=True)
    return str(uid)


def scan(axes: str = "LPS", tilt: float = 0.0, step: float = 2.5) -> tuple[np.ndarray, Affine]:
    values = np.random.default_rng(1).integers(-500, 500, (9, 7, 6), dtype=np.int16)
    affine = affine_of(axes, (0.8, 0.9, step), tilt)
    affine[:3, 3] = (-12.5, 30.25, -7.75)
    return values, affine


@pytest.mark.parametrize(("axes", "tilt"), [("LPS", 0.0), ("LPS", 0.25), ("PIL", 0.0), ("LSA", 0.1)])
def test_a_series_is_sorted_rescaled_and_placed(axes: str, tilt: float, tmp_path: Path) -> None:
    values, affine = scan(axes, tilt)
    write_series(tmp_path, values, affine)
    volume = read_volume(tmp_path)
    real = values * (0.5 + np.arange(6)) - 10
    # Slices are sorted along the normal, which may run against the order they were made in.
    normal = np.cross((LPS @ affine)[:3, 0], (LPS @ affine)[:3, 1])
    if normal @ (LPS @ affine)[:3, 2] < 0:
        real, affine = real[:, :, ::-1], affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 5], [0, 0, 0, 1.0]])
    np.testing.assert_allclose(volume.data, real, rtol=1e-6)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    assert len(volume.files) == 6


def test_a_tilted_gantry_gives_a_sheared_affine(tmp_path: Path) -> None:
    values, affine = scan()
    affine[1, 2] += 0.6
    write_series(tmp_path, values, affine)
    np.testing.assert_allclose(read_volume(tmp_path).affine, affine, atol=1e-5)


def test_missing_doubled_and_unequal_slices_are_named(tmp_path: Path) -> None:
    values, affine = scan()
    write_series(tmp_path / "gap", values, affine, skip=(2, 3))
    with pytest.raises(InputError, match=r"lacks slices at -2\.75, -0\.25 mm \(every 2\.5 mm\)"):
        read_volume(tmp_path / "gap")
    uid = write_series(tmp_path / "twice", values, affine)
    write_series(tmp_path / "twice", values, affine, uid, name="again")
    with pytest.raises(InputError, match=r"several slices at .* more than one volume"):
        read_volume(tmp_path / "twice")
    write_series(tmp_path / "odd", values, affine, ImagePositionPatient=["12.5", "-30.25", "0.1"])
    with pytest.raises(InputError, match=r"mm apart, first unequal at|lacks slices"):
        read_volume(tmp_path / "odd")
    write_series(tmp_path / "turned", values, affine, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    with pytest.raises(InputError, match=r"different orientations|holds 2 DICOM series"):
        read_volume(tmp_path / "turned")
    write_series(tmp_path / "one", values[:, :, :1], affine)
    with pytest.raises(InputError, match="single slice"):
        read_volume(tmp_path / "one")


def test_several_series_are_named_and_chosen(tmp_path: Path) -> None:
    values, affine = scan()
    first = write_series(tmp_path, values, affine, name="a")
    second = write_series(tmp_path, values + 1, affine, description="T1 pre", name="b")
    with pytest.raises(InputError, match=r"holds 2 DICOM series.*T1 p.*Choose one with series=UID") as raised:
        read_volume(tmp_path)
    assert first in str(raised.value) and second in str(raised.value)
    pre = read_volume(tmp_path, series=second).data
    np.testing.assert_array_equal(read_volume(tmp_path, series="T1 pre").data, pre)
    np.testing.assert_allclose(pre, (values + 1) * (0.5 + np.arange(6)) - 10, rtol=1e-6)
    with pytest.raises(InputError, match="series 'T2' is not known"):
        read_volume(tmp_path, series="T2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no DICOM series"):
        read_volume(tmp_path / "empty")
    with pytest.raises(InputError, match="folders with a DICOM series"):
        read_volume(tmp_path / "a000.dcm")


@pytest.mark.parametrize("tilt", [0.0, 0.25])
def test_a_segmentation_goes_back_to_its_voxels(tilt: float, tmp_path: Path) -> None:
    import highdicom

    values, affine = scan("LPS", tilt)
    source = write_series(tmp_path / "in", values, affine)
    volume = read_volume(tmp_path / "in")
    mask = np.random.default_rng(2).integers(0, 3, volume.grid.shape)
    mask[:, :, 4] = 0
    path = write_dicom_seg(tmp_path / "out" / "seg.dcm", mask, volume, ("tumour", "edema"), ("neoplasm", "edema"))
    seg = highdicom.seg.segread(path)
    assert seg.Modality == "SEG" and seg.ReferencedSeriesSequence[0].SeriesInstanceUID == source
    assert [one.segmented_property_type.value for one in seg.SegmentSequence] == ["108369006", "79654002"]
    by_file = [pydicom.dcmread(file).SOPInstanceUID for file in volume.files]
    frames = seg.get_pixels_by_source_instance(by_file, assert_missing_frames_are_empty=True)
    again = sum((number + 1) * frames[..., number] for number in range(2))
    np.testing.assert_array_equal(again.transpose(2, 1, 0), mask)
    found = seg.get_volume(combine_segments=True)
    lps = np.array(found.affine)
    np.testing.assert_allclose(np.sort(np.linalg.norm(lps[:3, :3], axis=0)), np.sort(volume.spacing), atol=1e-4)
    ones = np.argwhere(np.asarray(found.array) == 1) @ lps[:3, :3].T + lps[:3, 3]
    ours = (LPS @ volume.affine)[:3] @ np.c_[np.argwhere(mask == 1), np.ones((mask == 1).sum())].T
    np.testing.assert_allclose(np.sort(ones.sum(1)), np.sort(ours.T.sum(1)), atol=1e-3)


def test_an_empty_segmentation_can_be_written(tmp_path: Path) -> None:
    values, affine = scan()
    write_series(tmp_path / "in", values, affine)
    volume = read_volume(tmp_path / "in")
    path = write_dicom_seg(tmp_path / "seg.dcm", np.zeros(volume.grid.shape, bool), volume)
    assert not pydicom.dcmread(path).pixel_array.any()


def test_a_segmentation_needs_a_series_and_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, affine = scan()
    write_series(tmp_path / "in", values, affine)
    volume = read_volume(tmp_path / "in")
    mask = np.zeros(volume.grid.shape, np.uint8)
    with pytest.raises(InputError, match="no DICOM series"):
        write_dicom_seg(tmp_path / "s.dcm", mask, Volume(volume.data, affine, tmp_path / "a.nii"))
    with pytest.raises(InputError, match=r"suffix \.dcm"):
        write_dicom_seg(tmp_path / "s.nii", mask, volume)
    with pytest.raises(InputError, match="choose another folder"):
        write_dicom_seg(tmp_path / "in" / "s.dcm", mask, volume)
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "highdicom":
            raise ModuleNotFoundError("No module named 'highdicom'", name="highdicom")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=r"needs the package highdicom.*fovea-toolkit\[dicom\]"):
        write_dicom_seg(tmp_path / "s.dcm", mask, volume)
