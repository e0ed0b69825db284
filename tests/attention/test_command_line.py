"""``python -m attention`` and ``python -m attention.bench``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attention
from attention.__main__ import main
from attention.bench.__main__ import main as bench
from attention.bench.cases import case_of, refusal
from attention.bench.growth import Growth, plot
from attention.softmax import SoftmaxAttention
from kernels.measure import Machine


def test_the_table_has_a_row_for_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    for name in attention.available():
        assert name in shown
    assert "window_attention: torch" in shown and "MIT" in shown and "2103.14030" in shown


def test_one_kind_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--kind", "gate"]) == 0
    shown = capsys.readouterr().out
    assert "ela" in shown and "acmil" not in shown


def test_show_prints_parameters_and_costs_at_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "softmax", "--dim", "8", "--heads", "2", "--size", "4x5"]) == 0
    shown = capsys.readouterr().out
    assert "qkv.weight" in shown and "24 x 8" in shown and "1 x 4 x 5" in shown
    # 20 tokens: projections 2 * 20 * 8 * 32, attention 4 * 20 * 20 * 8
    total = [line for line in shown.splitlines() if line.strip().startswith("total")][-1]
    assert f"{(2 * 20 * 8 * 32 + 4 * 400 * 8) / 1e9:.4g}" in total


@pytest.mark.parametrize("name", attention.available())
def test_show_works_for_every_module(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in attention.kinds_of(name):
        assert main(["show", name, "--kind", kind, "--dim", "64", "--heads", "2"]) == 0
        assert "MB at least" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "windov"], "Did you mean 'window'"),
        (["show", "window", "--kind", "gate"], "of kind 'mixer' and a 'gate'"),
        (["show", "window", "--size", "3x"], "takes sizes such as 56x56"),
        (["show", "window", "--heads", "5"], "not divisible"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    answer = capsys.readouterr().err
    assert message in answer and "Traceback" not in answer and answer.count("\n") <= 1


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, attention; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_bench_compares_with_softmax_and_the_released_formulation_and_keeps_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "md", "png")}
    arguments = ["window", "--device", "cpu", "--size", "14x14x32", "--seconds", "0.01"]
    arguments += ["--json", str(files["json"]), "--markdown", str(files["md"]), "--plot", str(files["png"])]
    assert bench(arguments) == 0
    kept = json.loads(files["json"].read_text())
    assert [row["contestant"] for row in kept["results"]] == ["softmax attention", "fovea", "released formulation"]
    assert all(row["forward"] > 0 and row["both"] > 0 for row in kept["results"])
    assert kept["growth"][0]["mixer"] == "window"
    assert "| window |" in files["md"].read_text() and files["png"].stat().st_size > 1000
    assert "released formulation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["windov"], "Did you mean 'window'"),
        (["--size", "56"], "one to three axes and the channels"),
        (["--json", "/proc/nowhere/a.json", "window"], "cannot write /proc/nowhere"),
    ],
)
def test_the_bench_refuses_bad_input_before_it_measures(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(["--device", "cpu", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_what_would_take_too_long_is_left_out_with_the_reason() -> None:
    slow = Machine(1e9, {torch.float32: 1e9})
    module = SoftmaxAttention(32, 1)
    assert "one forward pass would take" in refusal(module, (1, 200, 200), slow, materialises=False)
    fast = Machine(1e12, {torch.float32: 1e15})
    assert "matrix of tokens by tokens would take 6 GB" in refusal(module, (1, 200, 200), fast, materialises=True)
    assert refusal(module, (1, 20, 20), fast, materialises=True) == ""
    assert case_of("window", (4, 4, 4, 32), fast, torch.device("cpu")) is None


def test_growth_of_known_powers_is_measured_and_drawn(tmp_path: Path) -> None:
    quadratic = Growth("softmax", "O(N^2)", {side: 1e-9 * side**4 for side in (16, 32, 64)})
    assert quadratic.slope == pytest.approx(2)
    assert Growth("window", "O(N)", {16: 1.0}).slope is None
    plot([quadratic], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
