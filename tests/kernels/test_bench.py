"""The bench: turns taken, wrong answers refused, ratios against the baseline, tables and JSON."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from kernels import bench
from kernels.errors import InputError
from kernels.measure import Case, Contestant, Machine, measure_machine, run_case

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def make_case(factor: float = 2.0) -> Case:
    x = torch.randn(200, 300, requires_grad=True)

    def slow() -> Tensor:
        return sum((x * 2 for _ in range(50)), torch.zeros_like(x)) / 50

    contestants = [
        Contestant("fovea", lambda: x * factor, [x]),
        Contestant("slow", slow, [x]),
        Contestant("forward only", lambda: x.detach() + x.detach()),
        Contestant("peer", lambda: x, absent="not installed"),
    ]
    return Case("doubling", contestants, "slow", flops=x.numel(), bytes=2 * x.numel() * 4)


def test_ratios_are_against_the_baseline_and_absent_peers_are_named() -> None:
    results = {r.contestant: r for r in run_case(make_case(), Machine(1e9, {torch.float32: 1e12}), CPU, seconds=0.05)}
    ours = results["fovea"]
    assert results["slow"].forward_ratio == 1.0 and ours.forward_ratio is not None and ours.forward_ratio > 2
    assert ours.forward is not None and ours.bytes_per_second == pytest.approx(480_000 / ours.forward)
    assert ours.roofline == pytest.approx(480_000 / 1e9 / ours.forward)
    assert results["forward only"].both is None and ours.both is not None
    assert ours.memory is not None and ours.memory >= 240_000
    assert results["peer"].forward is None and results["peer"].note == "not installed"
    console = Console(width=180, record=True, file=io.StringIO())
    console.print(bench.table("doubling", list(results.values())))
    text = console.export_text()
    assert "absent: not installed" in text and "1.00 = slow" in text


def test_a_wrong_answer_is_not_timed() -> None:
    with pytest.raises(InputError, match=r"fovea is 5\.0e-01 away from slow"):
        run_case(make_case(3.0), Machine(1e9), CPU, seconds=0.01)


def test_the_machine_has_limits() -> None:
    machine = measure_machine(CPU, [torch.float32])
    assert 1e8 < machine.copy < 1e13 and 1e8 < machine.matmul[torch.float32] < 1e15


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kernels.bench", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_mistakes_are_one_sentence() -> None:
    done = run("varlen_atention")
    assert done.returncode == 1 and "Did you mean 'varlen_attention'" in done.stderr and "Traceback" not in done.stderr
    if not torch.cuda.is_available():
        done = run("varlen_attention", "--device", "cuda")
        assert done.returncode == 1 and "no GPU" in done.stderr and "Traceback" not in done.stderr


def test_results_are_written(tmp_path: Path) -> None:
    results = run_case(make_case(), Machine(1e9), CPU, seconds=0.01)
    bench.write_json(tmp_path / "r" / "x.json", {"results": [vars(r) for r in results]})
    assert json.loads((tmp_path / "r" / "x.json").read_text())["results"][0]["case"] == "doubling"
    text = bench.markdown({"device": "a CPU"}, results)
    assert "| fovea |" in text and "a CPU" in text and "### doubling" in text
