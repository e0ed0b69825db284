"""The benchmark command: tables, JSON, absent sections, misspelt tasks."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import backbones
from attention.mixer import Mixer
from tasks import bench
from tasks.common import bench_backbones
from tasks.common.bench import BenchRow


def rows() -> Iterator[BenchRow]:
    """What a section gives; this module stands in for one."""
    yield BenchRow("a step", ours=0.05, peer=0.1, peer_name="the peer", peak_mb=1234.5)
    yield BenchRow("reading", ours=90.0, peer=100.0, peer_name="bare reads", unit="tiles/s")


def test_ratios_above_one_say_that_ours_is_better() -> None:
    assert [row.ratio for row in rows()] == pytest.approx([2.0, 0.9])


def test_rows_are_printed_and_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "SECTIONS", {"wsi_mil": {"training": __name__}})
    assert bench.main(["wsi_mil", "--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "rows.md")]) == 0
    printed = capsys.readouterr().out
    for expected in ("50.0 ms", "100.0 ms", "2.00", "1,234 MB", "the peer", "90 tiles/s", "0.90"):
        assert expected in printed
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in written] == ["a step", "reading"]
    assert written[0]["ratio"] == pytest.approx(2.0)
    lines = (tmp_path / "rows.md").read_text().splitlines()
    assert "### wsi_mil training" in lines and any(f"torch {torch.__version__}" in line for line in lines)
    assert lines[-2:] == [
        "| a step | 50.0 ms | 100.0 ms | 2.00 | 1,234 MB | the peer |",
        "| reading | 90 tiles/s | 100 tiles/s | 0.90 |  | bare reads |",
    ]


def test_a_section_that_is_not_there_is_said_to_be_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "SECTIONS", {"wsi_mil": {"nothing": "tasks.wsi_mil.bench_nothing"}})
    assert bench.main([]) == 0
    assert "wsi_mil nothing: absent, there is no tasks.wsi_mil.bench_nothing" in capsys.readouterr().out


def test_what_was_measured_outlives_a_row_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = list(rows())

    def failing() -> Iterator[BenchRow]:
        yield from measured
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sys.modules[__name__], "rows", failing)
    monkeypatch.setattr(bench, "SECTIONS", {"wsi_mil": {"training": __name__}})
    files = [tmp_path / name for name in ("rows.json", "rows.md")]
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.main(["--json", str(files[0]), "--markdown", str(files[1])])
    assert len(json.loads(files[0].read_text())) == 2 and "| reading |" in files[1].read_text()


@dataclass
class Tried:
    """An outcome as a matrix gives it; this module stands in for one."""

    name: str
    ok: bool
    said: str


OUTCOMES = [Tried("backbone one", True, "1.0 M parameters"), Tried("mixer two", True, "2.0 M parameters")]


def matrix() -> Iterator[Tried]:
    """What a matrix gives."""
    yield from OUTCOMES


def test_a_matrix_fails_when_one_of_its_combinations_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "MATRICES", {"qtseg": __name__})
    assert bench.main(["qtseg", "--matrix"]) == 0
    assert "2 of 2 combinations" in capsys.readouterr().out
    monkeypatch.setattr(sys.modules[__name__], "OUTCOMES", [*OUTCOMES, Tried("gate [x]", False, "RuntimeError: no")])
    assert bench.main(["--matrix"]) == 1
    assert "FAILED gate [x]: RuntimeError: no" in capsys.readouterr().out
    assert bench.main(["wsi_mil", "--matrix"]) == 1
    assert "--matrix is there for qtseg" in capsys.readouterr().err


def test_a_misspelt_task_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["wsi_mill"]) == 1
    assert "Did you mean 'wsi_mil'?" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--markdown", "--plot"])
def test_a_file_that_cannot_be_written_is_named_before_anything_is_measured(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "SECTIONS", {"wsi_mil": {"training": __name__}})
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "rows", tmp_path):  # below a file, and a folder
        assert bench.main(["wsi_mil", option, str(place)]) == 1
        printed = capsys.readouterr()
        assert "cannot write" in printed.err and "give another file" in printed.err and "a step" not in printed.out


def test_results_of_an_earlier_run_stay_until_there_are_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "SECTIONS", {"wsi_mil": {"training": __name__}})
    files = [tmp_path / name for name in ("rows.json", "rows.md", "rows.png")]
    arguments = [
        "wsi_mil",
        *(f"--{kind}={file}" for kind, file in zip(("json", "markdown", "plot"), files, strict=True)),
    ]
    monkeypatch.setitem(globals(), "rows", _stopped)
    assert bench.main(arguments) == 130
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == "stopped.\n"
    for file in files:
        file.write_text("earlier")
    assert bench.main(arguments) == 130
    assert {file.read_text() for file in files} == {"earlier"}


def _stopped() -> Iterator[BenchRow]:
    raise KeyboardInterrupt
    yield


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.0123, "s", "12.3 ms"),
        (2.5, "s", "2.5 s"),
        (123456.0, "tiles/s", "123,456 tiles/s"),
        (55.5, "x/s", "55.5 x/s"),
    ],
)
def test_quantities_are_short(value: float, unit: str, shown: str) -> None:
    assert bench.quantity(value, unit) == shown


def test_backbones_are_timed_beside_timms_and_beside_their_released_attention(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("FOVEA_BENCH_QUICK", "1")
    monkeypatch.setattr(bench_backbones, "PAIRS", (bench_backbones.Pair("metaformer_tiny", "resnet18"),))
    monkeypatch.setattr(bench_backbones, "RELEASED", ("nat_mini",))
    assert bench.main(["backbones", "--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "plot.png")]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["peer_name"].split()[0] for row in found] == ["resnet18", "resnet18", "itself,", "itself,"]
    assert all(row["ours"] > 0 and row["peer"] > 0 and row["peak_mb"] > 0 for row in found)
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_model_with_the_released_attention_gives_the_same_answers() -> None:
    ours, peer = (backbones.create("nat_mini", depths=(1, 1, 1, 1), embed_dim=32).eval() for _ in range(2))
    peer.load_state_dict(ours.state_dict())
    replaced = sum(bench_backbones._use_released(m) for m in peer.modules() if isinstance(m, Mixer))
    assert replaced == 4
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(peer(x), ours(x), rtol=1e-3, atol=1e-4)
