"""The compile gate: every Triton kernel, in every configuration that can be chosen, for Ampere and Hopper."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.backend import OPERATORS, TRITON_PROBLEM
from kernels.static import packages
from tests.kernels.conftest import CompileGate

ROOT = Path(__file__).parents[2]


def test_every_operator_states_its_calls() -> None:
    assert packages() == list(dict.fromkeys(place.partition(":")[0] for place in OPERATORS.values()))


@pytest.mark.slow
def test_every_configuration_compiles_within_its_bounds(compile_gate: CompileGate) -> None:
    code, rows, errors = compile_gate.result()
    assert [list(row.values()) for row in rows if row["problem"]] == []
    assert code == 0, errors
    for package in packages():
        mine = [r for r in rows if r["operator"] == package.rpartition(".")[2]]
        assert {r["capability"] for r in mine} == {80, 90}


BROKEN = """
import torch, triton, triton.language as tl
from kernels.launch import Config, launch

@triton.jit
def narrow(x, y, K: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, K)
    a = tl.load(x + rows[:, None] * K + columns[None, :])
    tl.store(y + rows[:, None] * BLOCK + rows[None, :], tl.dot(a, tl.trans(a)))

@triton.jit
def greedy(x, y, K: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, K)
    a = tl.load(x + rows[:, None] * K + columns[None, :])
    tl.store(y + rows[:, None] * BLOCK + rows[None, :], tl.dot(a, tl.trans(a), input_precision="ieee"))

def cases():
    for kernel, width, block, dtype in ((narrow, 8, 16, torch.bfloat16), (greedy, 128, 128, torch.float32)):
        x = torch.empty(block, width, dtype=dtype, device="meta")
        arguments = {"x": x, "y": torch.empty(block, block, device="meta"), "K": width}
        configs = [Config({"BLOCK": block})]
        yield kernel.__name__, lambda k=kernel, a=arguments, c=configs: launch(k, lambda _: (1,), a, c)
"""


@pytest.mark.skipif(TRITON_PROBLEM is not None, reason=str(TRITON_PROBLEM))
def test_the_gate_closes_on_narrow_products_and_on_spills(tmp_path: Path) -> None:
    package = tmp_path / "broken"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "triton_cases.py").write_text(BROKEN)
    code = """
from kernels import static
for case, launch in static._launches("broken"):
    print(static.compile_launch("broken", case, launch, 90).problem.partition("\\n")[0])
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    narrow, greedy = done.stdout.splitlines()
    assert narrow.startswith("does not compile")
    assert greedy.startswith("spills ") and greedy.endswith("0 allowed")


def test_no_kernel_uses_what_newer_tritons_removed() -> None:
    for path in (ROOT / "kernels").glob("*/triton_kernels.py"):
        source = path.read_text()
        for gone in ("make_block_ptr", "libdevice", "inline_asm", "triton.autotune"):
            assert gone not in source, f"{path}: {gone}"


def test_an_interpreting_process_has_nothing_to_compile() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kernels.bench", "--static", "varlen_attention"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "unset it to compile" in done.stderr and "Traceback" not in done.stderr
