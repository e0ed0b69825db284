"""Made heads: what is asked for is drawn, files are what readers expect, and a seed says everything."""

import csv
import hashlib
import itertools
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.ndimage import label

from kernels.errors import InputError
from tasks.meningioma.demo import make_heads
from tasks.meningioma.demo.grids import Grid
from tasks.meningioma.demo.heads import MadeHead, PlannedScan, make_head, plan
from tasks.meningioma.demo.tumours import LARGEST_ML, SITES, SMALLEST_ML

SEED, CASES, SIDE = 7, 12, 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_heads(tmp_path_factory.mktemp("heads") / "set", CASES, SEED, SIDE).parent


@pytest.fixture(scope="module")
def heads() -> list[tuple[PlannedScan, MadeHead]]:
    return [(scan, make_head(scan, i, SEED, SIDE)) for i, scan in enumerate(plan(CASES, SEED))]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def voxel_ml(head: MadeHead) -> float:
    return abs(float(np.linalg.det(head.grid.affine[:3, :3]))) / 1000


def test_tumours_have_the_volume_that_was_planned(heads: list[tuple[PlannedScan, MadeHead]]) -> None:
    for scan, head in heads:
        counts = np.bincount(head.tumours.ravel(), minlength=len(scan.tumours) + 1)[1:]
        assert len(counts) == len(scan.tumours)
        for tumour, count in zip(scan.tumours, counts, strict=True):
            volume = count * voxel_ml(head)
            asked = tumour.volume_ml * scan.growth
            assert 0.9 * asked - voxel_ml(head) <= volume <= asked + 0.51 * voxel_ml(head)
            assert SMALLEST_ML - voxel_ml(head) <= volume <= LARGEST_ML


def test_every_tumour_is_one_piece_attached_to_the_dura(heads: list[tuple[PlannedScan, MadeHead]]) -> None:
    seen = 0
    for scan, head in heads:
        for number in range(1, len(scan.tumours) + 1):
            mask = head.tumours == number
            assert label(mask)[1] == 1
            base = head.dura[mask] < max(head.grid.spacing)
            # A ball whose centre lies 0.45 radii deep has this broad a base, not a point of contact.
            assert base.sum() * head.grid.spacing.max() ** 2 >= 0.5 * (mask.sum() * voxel_ml(head) * 1000) ** (2 / 3)
            seen += 1
    assert seen >= 8


def test_tumours_stand_out_of_the_brain(heads: list[tuple[PlannedScan, MadeHead]]) -> None:
    for scan, head in heads:
        brain = head.image[np.isfinite(head.dura) & (head.dura > 12) & (head.tumours == 0)]
        for number, tumour in enumerate(scan.tumours, 1):
            inside = head.image[head.tumours == number]
            factor = 1.05 if tumour.look == "faint" else 1.2
            assert inside.mean() > factor * np.median(brain)


def test_plans_spread_patients_sites_and_sizes() -> None:
    scans = plan(48, 3)
    assert [scan.case_id for scan in scans] == [f"head_{i + 1:03d}" for i in range(48)]
    by_patient: dict[int, list[PlannedScan]] = {}
    for scan in scans:
        by_patient.setdefault(scan.patient, []).append(scan)
    followed = [own for own in by_patient.values() if len(own) == 2]
    assert (len(by_patient), len(followed)) == (40, 8)
    for first, second in followed:
        assert second.date > first.date and second.growth > 1.25 and first.growth == 1
        assert first.tumours == second.tumours and len(first.tumours) == 1
    counts = [len(own[0].tumours) for own in by_patient.values()]
    assert (counts.count(0), counts.count(2)) == (8, 6)
    tumours = [t for scan in scans for t in scan.tumours]
    assert {t.site for t in tumours} == set(SITES)
    assert min(t.volume_ml for t in tumours) < 0.5 and max(t.volume_ml for t in tumours) > 20
    assert all(t.volume_ml * scan.growth <= LARGEST_ML for scan in scans for t in scan.tumours)
    assert plan(48, 3) == scans and plan(48, 4) != scans


def test_a_followed_tumour_grows_where_it_was(heads: list[tuple[PlannedScan, MadeHead]]) -> None:
    first, second = next((a, b) for a, b in itertools.pairwise(heads) if a[0].patient == b[0].patient)
    centres = []
    for _, head in (first, second):
        index = np.argwhere(head.tumours == 1).mean(axis=0)
        centres.append((head.grid.pose @ head.grid.affine @ np.append(index, 1))[:3])
    assert np.linalg.norm(centres[0] - centres[1]) < 6
    volumes = [(head.tumours > 0).sum() * voxel_ml(head) for _, head in (first, second)]
    assert volumes[1] / volumes[0] == pytest.approx(second[0].growth, rel=0.2)
    assert first[1].grid.shape != second[1].grid.shape or not np.allclose(first[1].grid.affine, second[1].grid.affine)


def test_grids_differ_in_orientation_spacing_and_tilt() -> None:
    grids = [Grid.draw(np.random.default_rng([1, i]), i, 64) for i in range(24)]
    assert len({nibabel.aff2axcodes(g.affine) for g in grids}) >= 8
    assert {np.linalg.det(g.affine) > 0 for g in grids} == {True, False}
    assert all(48 <= n <= 64 for g in grids for n in g.shape)
    assert all(max(g.shape) == 64 for g in grids)
    assert any(g.spacing.max() / g.spacing.min() > 1.4 for g in grids)
    tilted = [np.sort(np.abs(g.affine[:3, :3] / g.spacing), axis=0)[1].max() > 0.02 for g in grids]
    assert sum(tilted) == 8
    for g in grids:  # a rotation, so that both header forms can hold it
        directions = g.affine[:3, :3] / g.spacing
        np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-9)


def test_files_are_an_nnunet_folder_that_nibabel_reads(folder: Path) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "tumour": 1}
    assert description["channel_names"] == {"0": "T1c"}
    assert description["file_ending"] == ".nii.gz"
    assert description["numTraining"] == CASES == len(list((folder / "imagesTr").iterdir()))
    stored, codes = set(), set()
    for row in rows(folder / "cases.csv"):
        image, mask = nibabel.load(folder / row["image"]), nibabel.load(folder / row["label"])
        assert row["image"] == f"imagesTr/{row['case_id']}_0000.nii.gz"
        assert image.shape == mask.shape and max(image.shape) == SIDE
        np.testing.assert_allclose(image.affine, mask.affine, atol=1e-4)
        values = image.get_fdata()
        assert np.isfinite(values).all() and values.min() >= 0 and values.std() > 0
        assert mask.get_data_dtype() == np.uint8 and set(np.unique(mask.dataobj)) <= {0, 1}
        assert image.header.get_xyzt_units()[0] == "mm"
        stored.add((str(image.get_data_dtype()), float(image.dataobj.slope)))
        codes.add((int(image.header["qform_code"]), int(image.header["sform_code"])))
    assert stored == {("int16", 1.0), ("uint8", 1.0), ("float32", 1.0), ("int16", 0.25)}
    assert codes == {(1, 1), (0, 1), (1, 0)}


def test_simpleitk_reads_the_same_geometry(folder: Path) -> None:
    import SimpleITK

    for row in rows(folder / "cases.csv")[:5]:
        theirs, ours = SimpleITK.ReadImage(str(folder / row["image"])), nibabel.load(folder / row["image"])
        corner = np.array(theirs.TransformIndexToPhysicalPoint((0, 0, 0))) * (-1, -1, 1)
        np.testing.assert_allclose(corner, ours.affine[:3, 3], atol=1e-3)
        np.testing.assert_allclose(theirs.GetSpacing(), ours.header.get_zooms(), rtol=1e-5)
        assert pytest.approx(ours.get_fdata(), abs=1e-4) == SimpleITK.GetArrayFromImage(theirs).T


def test_written_volumes_are_those_listed(folder: Path) -> None:
    listed: dict[str, float] = {}
    for row in rows(folder / "tumours.csv"):
        listed[row["case_id"]] = listed.get(row["case_id"], 0.0) + float(row["volume_ml"])
    for row in rows(folder / "cases.csv"):
        mask = nibabel.load(folder / row["label"])
        volume = np.asanyarray(mask.dataobj).sum() * abs(np.linalg.det(mask.affine[:3, :3])) / 1000
        assert volume == pytest.approx(listed.get(row["case_id"], 0.0), abs=2e-3)


def test_a_seed_repeats_every_byte_and_another_seed_none(tmp_path: Path) -> None:
    def digests(name: str, seed: int) -> dict[str, str]:
        root = make_heads(tmp_path / name, 6, seed, 48).parent
        files = sorted(p for p in root.rglob("*.nii.gz") if "imagesTr" in str(p))
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    first, again, other = digests("a", 1), digests("b", 1), digests("c", 2)
    assert first == again
    assert not set(first.values()) & set(other.values())


def test_a_finished_folder_is_found_again_and_a_foreign_one_refused(folder: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert make_heads(folder, CASES, SEED, SIDE) == folder / "cases.csv"
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    with pytest.raises(InputError, match="holds other files"):
        make_heads(folder, CASES + 1, SEED, SIDE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scan.nii").write_text("x")
    with pytest.raises(InputError, match=r"data\.heads\.folder=.*holds other files"):
        make_heads(tmp_path / "mine", 6)
    assert not list(tmp_path.glob(".demo_heads*"))


@pytest.mark.parametrize(("cases", "side", "message"), [(5, 64, "cases=5: 6"), (6, 47, "side=47")])
def test_too_little_is_refused_in_a_sentence(tmp_path: Path, cases: int, side: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_heads(tmp_path / "set", cases, 1, side)


def test_an_interrupted_run_leaves_nothing_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.meningioma.demo import heads as module

    def interrupted(*arguments: object) -> MadeHead:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "make_head", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_heads(tmp_path / "set", 6, 1, 48)
    assert list(tmp_path.iterdir()) == []
