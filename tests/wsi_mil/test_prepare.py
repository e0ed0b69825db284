"""A cohort is prepared once, whatever happens in between: kills, damaged slides, other processes, changed settings."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from kernels.errors import InputError
from tasks.common.contours import read_geojson
from tasks.wsi_mil import cohort_work, prepare
from tasks.wsi_mil.cohort import SlideFile, SlidesTable, find_slides
from tasks.wsi_mil.features import find_bags, read_attributes, read_coords, read_features
from tasks.wsi_mil.locks import FileLock
from tasks.wsi_mil.prepare import plan_cohort, prepare_cohort, prepare_slide, raise_if_failed
from tasks.wsi_mil.prepare_options import PrepareOptions
from tasks.wsi_mil.slides import open_slide
from tasks.wsi_mil.tissue import TissueOptions
from tests.wsi_mil.slide_files import SmallEncoder, tissue_image, write_pyramid
from tests.wsi_mil.test_slides import damaged_slide

OPTIONS = PrepareOptions(mpp=0.5, tile=64, workers=0, batch_size=8, device="cpu")
ROOT = Path(__file__).parents[2]


class Counting(SmallEncoder):
    """Counts the tiles it was given."""

    tiles = 0

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        self.tiles += len(tiles)
        return super().forward(tiles)


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    for i, name in enumerate(("007", "b", "c")):
        write_pyramid(tmp_path / "slides" / f"{name}.tif", tissue_image(500 + 40 * i, 450, seed=i))
    return tmp_path / "slides"


def contents(out: Path) -> dict[str, np.ndarray]:
    return {name: read_features(info) for name, info in find_bags(out / "features").items()}


def test_features_are_those_of_the_tiles_at_their_coordinates(slides: Path, tmp_path: Path) -> None:
    out, encoder = tmp_path / "out", SmallEncoder()
    reports = prepare_cohort(find_slides(slides), out, encoder, OPTIONS)
    assert [(r.slide_id, r.status) for r in reports] == [("007", "done"), ("b", "done"), ("c", "done")]
    for slide_id, info in find_bags(out / "features").items():
        coords = read_coords(info)
        assert coords is not None and coords.size == 64
        order = np.lexsort((coords.xy[:, 0], coords.xy[:, 1]))
        np.testing.assert_array_equal(order, np.arange(info.num_tiles))  # row by row
        with open_slide(slides / f"{slide_id}.tif") as slide:
            tiles = np.stack([slide.read_region(x, y, 64, 64) for x, y in coords.xy.tolist()])
            width, height = slide.dimensions
        with torch.inference_mode():
            expected = encoder(torch.from_numpy(tiles).permute(0, 3, 1, 2)).numpy()
        np.testing.assert_allclose(read_features(info), expected, atol=1e-5)
        about = read_attributes(info)
        assert (about["level0_width"], about["level0_height"]) == (width, height)
        assert about["slide_path"] == str(slides / f"{slide_id}.tif")
        assert about["encoder"] == "small" and about["weights"] == "random, seed 0"
        assert about["requested_mpp"] == 0.5 and about["achieved_mpp"] == pytest.approx(0.5, rel=1e-3)
        assert about["patch_size"] == about["patch_size_level0"] == 64 and about["overlap"] == 0
        assert (out / "thumbnails" / f"{slide_id}.jpg").stat().st_size > 500
        assert (out / "contours" / f"{slide_id}.jpg").stat().st_size > 500
        assert len(read_geojson(out / "contours_geojson" / f"{slide_id}.geojson")[0]) == 1
    rows = SlidesTable(out / "slides.csv").rows()
    assert [(r["slide_id"], r["status"]) for r in rows] == [("007", "done"), ("b", "done"), ("c", "done")]
    assert all(int(r["tiles"]) > 5 and float(r["seconds"]) > 0 for r in rows)
    left = [
        p.name for p in out.rglob("*") if p.is_file() and (".partial" in p.parts or p.name.endswith((".lock", ".bin")))
    ]
    assert left == []


@pytest.mark.parametrize(("workers", "batch_size"), [(2, 8), (0, 5), (1, 64)])
def test_the_result_does_not_depend_on_workers_or_batches(
    slides: Path, tmp_path: Path, workers: int, batch_size: int
) -> None:
    found = find_slides(slides)
    prepare_cohort(found, tmp_path / "one", SmallEncoder(), OPTIONS)
    prepare_cohort(found, tmp_path / "two", SmallEncoder(), replace(OPTIONS, workers=workers, batch_size=batch_size))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-6)


def test_complete_slides_are_skipped_after_a_check(slides: Path, tmp_path: Path) -> None:
    out, found = tmp_path / "out", find_slides(slides)
    prepare_cohort(found, out, SmallEncoder(), OPTIONS)
    times = {p: p.stat().st_mtime_ns for p in (out / "features").iterdir()}
    encoder = Counting()
    reports = prepare_cohort(found, out, encoder, OPTIONS)
    assert [(r.status, r.reason) for r in reports] == [("skipped", "complete")] * 3
    assert all(r.tiles and r.mpp and r.achieved_mpp for r in reports)
    assert encoder.tiles == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "features").iterdir()} == times


def damage_by_truncation(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def damage_the_coordinates(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["coords"][0] += 1


def lose_a_row(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        features = file["features"][:-1]
        del file["features"]
        file["features"] = features


def lose_the_mark(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file.attrs["complete"]


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_the_coordinates, lose_a_row, lose_the_mark])
def test_a_file_that_is_there_but_not_whole_is_made_again(slides: Path, tmp_path: Path, damage: object) -> None:
    out, found = tmp_path / "out", find_slides(slides)
    prepare_cohort(found, out, SmallEncoder(), OPTIONS)
    before = contents(out)
    damage(out / "features" / "b.h5")  # type: ignore[operator]
    reports = prepare_cohort(found, out, SmallEncoder(), OPTIONS)
    assert [r.status for r in reports] == ["skipped", "done", "skipped"]
    assert "damaged" in reports[1].reason or "incomplete" in reports[1].reason
    np.testing.assert_array_equal(contents(out)["b"], before["b"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mpp": 1.0}, "mpp was 0.5, is 1.0"),
        ({"overlap": 16}, "overlap was 0, is 16"),
        ({"float16": True}, "float16 was False, is True"),
        ({"tissue": TissueOptions(reject_pen=True)}, "tissue was"),
        ({"mpp_override": 0.5}, "slide_mpp was None, is 0.5"),
    ],
)
def test_changed_settings_are_named_and_done_again(
    slides: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    out, slide = tmp_path / "out", find_slides(slides)[:1]
    prepare_cohort(slide, out, SmallEncoder(), OPTIONS)
    changed = replace(OPTIONS, **change)  # type: ignore[arg-type]
    (report,) = prepare_cohort(slide, out, SmallEncoder(), changed)
    assert report.status == "done" and said in report.reason
    assert prepare_cohort(slide, out, SmallEncoder(), changed)[0].status == "skipped"


def test_other_weights_or_another_slide_under_the_same_name_are_done_again(slides: Path, tmp_path: Path) -> None:
    out, slide = tmp_path / "out", find_slides(slides)[:1]
    prepare_cohort(slide, out, SmallEncoder(), OPTIONS)
    (report,) = prepare_cohort(slide, out, SmallEncoder(seed=1), OPTIONS)
    assert report.status == "done" and "encoder_weights" in report.reason
    write_pyramid(slide[0].path, tissue_image(600, 450))
    (report,) = prepare_cohort(slide, out, SmallEncoder(seed=1), OPTIONS)
    assert report.status == "done" and "slide_bytes" in report.reason


def test_features_stay_when_the_slide_has_gone(slides: Path, tmp_path: Path) -> None:
    slide = find_slides(slides)[:1]
    prepare_cohort(slide, tmp_path / "out", SmallEncoder(), OPTIONS)
    slide[0].path.unlink()
    assert prepare_cohort(slide, tmp_path / "out", SmallEncoder(), OPTIONS)[0].status == "skipped"


def test_failed_slides_have_their_reason_and_leave_the_others_alone(slides: Path, tmp_path: Path) -> None:
    damaged_slide(slides / "damaged.tif")
    write_pyramid(slides / "empty.tif", np.full((300, 300, 3), 244, np.uint8))
    write_pyramid(slides / "no_mpp.tif", tissue_image(300, 300), mpp=None)
    write_pyramid(slides / "coarse.tif", tissue_image(300, 300), mpp=2.0)
    (slides / "broken.svs").write_bytes(b"broken")
    found = [*find_slides(slides), SlideFile("gone", slides / "gone.svs")]
    out = tmp_path / "out"
    reports = {r.slide_id: r for r in prepare_cohort(found, out, SmallEncoder(), replace(OPTIONS, workers=1))}
    assert {k for k, r in reports.items() if r.status == "done"} == {"007", "b", "c"}
    for name, reason in {
        "damaged": "cannot be read",
        "empty": "no tissue found",
        "no_mpp": "does not say how many micrometres",
        "coarse": "has 2 µm per pixel, coarser than the 0.5 asked for",
        "broken": "in no format OpenSlide reads",
        "gone": "does not exist",
    }.items():
        assert reports[name].status == "failed"
        assert reason in reports[name].reason
        assert not (out / "features" / f"{name}.h5").exists()
    assert {r["slide_id"] for r in SlidesTable(out / "slides.csv").rows() if r["status"] == "failed"} == set(
        reports
    ) - {
        "007",
        "b",
        "c",
    }
    with pytest.raises(
        InputError, match=r"6 of 9 slides failed, first 'broken': .*slides\.csv, the other slides are done"
    ):
        raise_if_failed(list(reports.values()), out)
    again = prepare_cohort(found, out, SmallEncoder(), OPTIONS)
    assert sorted(r.status for r in again) == ["failed"] * 6 + ["skipped"] * 3


def test_the_resolution_can_be_given_by_slide(slides: Path, tmp_path: Path) -> None:
    write_pyramid(slides / "d.tif", tissue_image(400, 400), mpp=None)
    (tmp_path / "mpp.csv").write_text("wsi,mpp\nd.tif,0.25\n")
    options = replace(OPTIONS, mpp_overrides=tmp_path / "mpp.csv")
    report = prepare_cohort(find_slides(slides / "d.tif"), tmp_path / "out", SmallEncoder(), options)[0]
    assert (report.status, report.mpp) == ("done", 0.25)
    coords = read_coords(find_bags(tmp_path / "out")["d"])
    assert coords is not None and coords.size == 128


def test_unreadable_tiles_taken_as_white_are_counted(tmp_path: Path) -> None:
    slide = [SlideFile("d", damaged_slide(tmp_path / "d.tif"))]
    options = replace(OPTIONS, on_bad_tile="white", tissue=TissueOptions(preset="none"), workers=1)
    (report,) = prepare_cohort(slide, tmp_path / "out", SmallEncoder(), options)
    assert (report.status, report.tiles) == ("done", 32)
    assert "16 unreadable tiles taken as white" in report.reason
    (info,) = find_bags(tmp_path / "out").values()
    assert read_attributes(info)["tiles_white"] == 16


def test_blurred_tiles_are_left_out_of_the_file(slides: Path, tmp_path: Path) -> None:
    slide = find_slides(slides)[:1]
    prepare_cohort(slide, tmp_path / "all", SmallEncoder(), replace(OPTIONS, tissue=TissueOptions(preset="none")))
    sharp = TissueOptions(preset="none", reject_blur=100.0)
    (report,) = prepare_cohort(slide, tmp_path / "sharp", SmallEncoder(), replace(OPTIONS, tissue=sharp))
    everything, some = (find_bags(tmp_path / name)["007"] for name in ("all", "sharp"))
    assert 0 < some.num_tiles < everything.num_tiles
    rejected = everything.num_tiles - some.num_tiles
    assert f"{rejected} of {everything.num_tiles} tiles out of focus" in report.reason
    assert read_attributes(some)["tiles_out_of_focus"] == rejected
    all_coords, coords = read_coords(everything), read_coords(some)
    assert all_coords is not None and coords is not None
    places = [all_coords.xy.tolist().index(xy) for xy in coords.xy.tolist()]
    np.testing.assert_allclose(read_features(some), read_features(everything)[places], atol=1e-6)
    none = replace(OPTIONS, tissue=replace(sharp, reject_blur=1e9))
    (report,) = prepare_cohort(slide, tmp_path / "none", SmallEncoder(), none)
    assert report.status == "failed" and "tiles are out of focus" in report.reason


def test_an_encoder_that_gives_nan_fails_the_slide(slides: Path, tmp_path: Path) -> None:
    encoder = SmallEncoder()
    with torch.no_grad():
        encoder.layer.bias[0] = torch.nan
    (report, _) = prepare_cohort(find_slides(slides)[:2], tmp_path / "out", encoder, OPTIONS)
    assert report.status == "failed" and "encoder 'small' gave NaN or infinite features" in report.reason


def test_a_dry_run_tells_and_writes_nothing(slides: Path, tmp_path: Path) -> None:
    out, found = tmp_path / "out", find_slides(slides)
    write_pyramid(slides / "empty.tif", np.full((300, 300, 3), 244, np.uint8))
    prepare_cohort(found[:1], out, SmallEncoder(), OPTIONS)
    before = sorted(out.rglob("*"))
    reports = plan_cohort(find_slides(slides), out, SmallEncoder(), OPTIONS)
    assert sorted(out.rglob("*")) == before
    assert [r.status for r in reports] == ["skipped", "would do", "would do", "would fail"]
    done = prepare_cohort(found, out, SmallEncoder(), OPTIONS)
    assert [r.tiles for r in done] == [r.tiles for r in reports[:3]]


def test_one_slide_from_python(slides: Path, tmp_path: Path) -> None:
    info = prepare_slide(slides / "b.tif", tmp_path / "out", SmallEncoder(), OPTIONS)
    assert (info.slide_id, info.dim) == ("b", 12)
    assert prepare_slide(slides / "b.tif", tmp_path / "out", SmallEncoder(), OPTIONS) == info
    with pytest.raises(InputError, match="does not exist"):
        prepare_slide(slides / "x.tif", tmp_path / "out", SmallEncoder(), OPTIONS)


def test_the_encoder_says_the_resolution_and_tile_size_where_the_user_does_not(slides: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, mpp=None, tile=None)
    info = prepare_slide(slides / "b.tif", tmp_path / "out", SmallEncoder(mpp=1.0, input_size=32), options)
    about = read_attributes(info)
    assert (about["requested_mpp"], about["patch_size"], about["patch_size_level0"]) == (1.0, 32, 64)


def test_outlines_edited_in_the_output_folder_are_used_and_kept(slides: Path, tmp_path: Path) -> None:
    out, slide = tmp_path / "out", find_slides(slides)[:1]
    before = prepare_cohort(slide, out, SmallEncoder(), OPTIONS)[0]
    edited = out / "contours_geojson" / "007.geojson"
    content = json.loads(edited.read_text())
    content["features"][0]["geometry"]["coordinates"] = [[[150, 150], [300, 150], [300, 250], [150, 250], [150, 150]]]
    edited.write_text(json.dumps(content))
    options = replace(OPTIONS, tissue=TissueOptions(annotations=edited.parent))
    after = prepare_cohort(slide, out, SmallEncoder(), options)[0]
    assert after.status == "done" and before.tiles is not None and after.tiles is not None
    assert after.tiles < before.tiles
    assert json.loads(edited.read_text()) == content


# Kills, other processes, disks ---------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from tasks.wsi_mil.cohort import find_slides
from tasks.wsi_mil.prepare import prepare_cohort
from tasks.wsi_mil.prepare_options import PrepareOptions
from tests.wsi_mil.slide_files import SmallEncoder
class Slow(SmallEncoder):
    def forward(self, tiles):
        time.sleep(0.15)
        return super().forward(tiles)
if __name__ == "__main__":
    options = PrepareOptions(mpp=0.5, tile=64, workers=1, batch_size=8, device="cpu")
    prepare_cohort(find_slides(sys.argv[1]), sys.argv[2], Slow(), options)
"""


@pytest.fixture
def large_slides(tmp_path: Path) -> Path:
    for name in ("007", "b", "c"):
        write_pyramid(tmp_path / "slides" / f"{name}.tif", tissue_image(900, 800))
    return tmp_path / "slides"


@pytest.fixture
def slow_run(large_slides: Path, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(large_slides), str(tmp_path / "out")], cwd=ROOT)
    yield process
    process.kill()
    process.wait()


def wait_until_second_slide_is_half_done(out: Path) -> None:
    give_up = time.monotonic() + 90
    while time.monotonic() < give_up:
        partial = out / ".partial" / "b.bin"
        if (out / "features" / "007.h5").exists() and partial.exists():
            _, _, records = partial.read_bytes().partition(b"\n")
            if len(records) >= 2 * 8 * 13 * 4:  # two batches of eight tiles
                return
        time.sleep(0.005)
    raise AssertionError("the other process did not get to the second slide")


@pytest.mark.slow
def test_after_kill_9_the_same_call_goes_on_where_it_was(
    large_slides: Path, tmp_path: Path, slow_run: "subprocess.Popen[bytes]"
) -> None:
    out = tmp_path / "out"
    wait_until_second_slide_is_half_done(out)
    slow_run.send_signal(signal.SIGKILL)
    slow_run.wait()
    finished = (out / "features" / "007.h5").stat().st_mtime_ns
    (out / "features" / ".b.h5.left.partial.h5").write_bytes(b"half a file of a killed run")
    encoder = Counting()
    reports = prepare_cohort(find_slides(large_slides), out, encoder, OPTIONS)
    assert [r.status for r in reports] == ["skipped", "done", "done"]
    assert (out / "features" / "007.h5").stat().st_mtime_ns == finished
    remaining = (reports[1].tiles or 0) + (reports[2].tiles or 0)
    assert encoder.tiles <= remaining - 8  # at least a batch of the second slide was not computed again
    unbroken = prepare_cohort(find_slides(large_slides), tmp_path / "whole", SmallEncoder(), OPTIONS)
    assert [r.tiles for r in unbroken] == [r.tiles for r in reports]
    for name, features in contents(tmp_path / "whole").items():
        np.testing.assert_array_equal(contents(out)[name], features)
    assert sorted(p.name for p in (out / "features").iterdir()) == ["007.h5", "b.h5", "c.h5"]


@pytest.mark.slow
def test_two_processes_share_a_cohort_and_never_a_slide(
    large_slides: Path, tmp_path: Path, slow_run: "subprocess.Popen[bytes]"
) -> None:
    out = tmp_path / "out"
    wait_until_second_slide_is_half_done(out)
    encoder = Counting()
    reports = prepare_cohort(find_slides(large_slides), out, encoder, OPTIONS)
    assert (reports[1].status, reports[1].tiles) == ("skipped", None)
    assert f"process {slow_run.pid} on" in reports[1].reason
    assert slow_run.wait(60) == 0
    assert set(contents(out)) == {"007", "b", "c"}
    assert {r["slide_id"]: r["status"] for r in SlidesTable(out / "slides.csv").rows()}["b"] == "done"


def test_a_slide_another_process_has_is_left_to_it(slides: Path, tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "out" / ".locks" / "b.lock")
    assert lock.acquire()
    reports = prepare_cohort(find_slides(slides), tmp_path / "out", SmallEncoder(), OPTIONS)
    assert [r.status for r in reports] == ["done", "skipped", "done"]
    with pytest.raises(InputError, match=f"process {os.getpid()} on .* is working on it; wait for it"):
        prepare_slide(slides / "b.tif", tmp_path / "out", SmallEncoder(), OPTIONS)
    lock.release()
    assert prepare_cohort(find_slides(slides), tmp_path / "out", SmallEncoder(), OPTIONS)[1].status == "done"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_ends_the_run_with_one_sentence_and_frees_the_locks(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    out = tmp_path / "out"
    written = cohort_work.PartialFeatures.append

    def full(self: cohort_work.PartialFeatures, features: np.ndarray, state: np.ndarray) -> None:
        if self.path.name == "b.bin":
            # The device that is always full: the same error number from the same call.
            with Path("/dev/full").open("wb", buffering=0) as device:
                self._file.close()
                self._file = device
                written(self, features, state)
        written(self, features, state)

    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    monkeypatch.setattr(cohort_work.PartialFeatures, "append", full)
    with pytest.raises(InputError, match=r"cannot write .*b\.bin: the disk is full; free some space"):
        prepare_cohort(find_slides(slides), out, SmallEncoder(), replace(OPTIONS, workers=workers))
    assert list((out / ".locks").iterdir()) == []
    monkeypatch.undo()
    reports = prepare_cohort(find_slides(slides), out, SmallEncoder(), OPTIONS)
    assert [r.status for r in reports] == ["skipped", "done", "done"]


def test_an_output_folder_that_cannot_be_made_is_one_sentence(slides: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*file"):
        prepare_cohort(find_slides(slides), tmp_path / "file" / "out", SmallEncoder(), OPTIONS)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_folder_is_one_sentence(slides: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    with pytest.raises(InputError, match=r"cannot write .*permission is denied"):
        prepare_cohort(find_slides(slides), tmp_path / "out", SmallEncoder(), OPTIONS)


# Configuration -------------------------------------------------------------------------------------------------------


def test_the_configuration_file_has_every_option_with_its_default() -> None:
    data = OmegaConf.load(ROOT / "conf" / "data" / "cohort.yaml")
    assert PrepareOptions.from_config(data) == PrepareOptions()  # type: ignore[arg-type]
    assert set(PrepareOptions.__dataclass_fields__) | {"slides"} <= set(data)  # type: ignore[arg-type]
    assert set(data.tissue) == set(TissueOptions.__dataclass_fields__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_tile": "skip"}, "data.on_bad_tile=skip"),
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"min_tissue": 2.0}, "data.min_tissue=2.0"),
        ({"mpp": 500}, "data.mpp is 500"),
        ({"mpp_override": -1}, "data.mpp_override is -1"),
        ({"tile": 64, "overlap": 64}, "data.overlap=64"),
        ({"tissue": {"annotations": "/nowhere"}}, "data.tissue.annotations=/nowhere is no folder"),
    ],
)
def test_bad_options_are_refused_before_any_slide_is_opened(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        PrepareOptions.from_config(OmegaConf.create(options))


def test_a_run_without_slides_says_what_to_give() -> None:
    with pytest.raises(InputError, match=r"data\.slides is not set"):
        prepare.run(OmegaConf.create({"data": {"slides": None}}))


def test_a_real_slide_from_file_to_features(shared_data: Path, tmp_path: Path) -> None:
    slide = shared_data / "wsi" / "CMU-1-Small-Region.svs"
    info = prepare_slide(slide, tmp_path, SmallEncoder(), replace(OPTIONS, tile=224, workers=1))
    assert 50 <= info.num_tiles <= 75
    assert read_attributes(info)["mpp_source"] == "openslide.mpp-x"
    features = read_features(info)
    assert features.std(axis=0).min() > 1e-4
