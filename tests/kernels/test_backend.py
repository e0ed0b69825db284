"""Which implementation serves: the call's word, the process's, or what the tensors allow; and always with a reason."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import backend
from kernels.backend import choose, explain, using
from kernels.errors import InputError

ROOT = Path(__file__).parents[2]


def test_auto_takes_pytorch_on_the_cpu_and_says_why() -> None:
    choice = choose("varlen_attention", "auto", [torch.zeros(3)])
    assert choice.backend == "torch"
    assert "interpreted" in choice.reason or "on the CPU" in choice.reason
    assert str(choice).startswith("varlen_attention: torch, because ")
    assert "not float64" in choose("varlen_attention", "auto", [torch.zeros(3, dtype=torch.float64)]).reason


def test_the_call_goes_before_the_process() -> None:
    with using(backend="reference"):
        assert choose("varlen_attention", "auto", []).reason == "backend='reference' of the process asks for it"
        assert choose("varlen_attention", "torch", []).backend == "torch"
    assert choose("varlen_attention", "auto", [torch.zeros(1)]).backend == "torch"


def test_what_is_forced_and_cannot_serve_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match="backend 'triton' of the call cannot serve because Triton serves float32"):
        choose("varlen_attention", "triton", [torch.zeros(3, dtype=torch.int64)])
    with pytest.raises(InputError, match="because heads are too wide; use kernels=auto"), using(backend="triton"):
        choose("varlen_attention", "auto", [torch.zeros(3, device="meta")], "heads are too wide")
    with pytest.raises(InputError, match="Did you mean 'torch'"):
        choose("varlen_attention", "torhc", [])
    with pytest.raises(InputError, match="Did you mean 'triton'"):
        kernels.configure(backend="tritn")
    with pytest.raises(InputError, match=r"'varlen_atention' is not known\. Did you mean 'varlen_attention'"):
        explain("varlen_atention")


def test_every_operator_can_be_explained() -> None:
    for name, place in backend.OPERATORS.items():
        module, _, function = place.partition(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function)), name


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", ["FOVEA_KERNELS"])
def test_the_environment_sets_the_process(name: str) -> None:
    code = "from kernels.backend import choose; print(choose('varlen_attention', 'auto', []).backend)"
    assert run(code, **{name: "reference"}).stdout.strip() == "reference"
    assert "Did you mean 'reference'" in run(code, **{name: "refrence"}).stderr


def test_without_triton_everything_but_triton_works() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as on macOS and Windows
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from kernels.backend import explain
from kernels.varlen_attention import varlen_attention
q, cuts = torch.randn(5, 1, 8), torch.tensor([0, 2, 5])
print(varlen_attention(q, q, q, cuts, cuts)[0].shape, explain(varlen_attention, q, q, q, cuts, cuts).reason)
try:
    varlen_attention(q, q, q, cuts, cuts, backend="triton")
except ValueError as error:
    print(error)
"""
    done = run(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert "torch.Size([5, 1, 8]) Triton is not installed" in done.stdout
    assert "cannot serve because Triton is not installed" in done.stdout


def test_without_the_interpreter_a_cpu_is_not_served_by_triton() -> None:
    code = "import torch; from kernels.backend import choose; choose('varlen_attention', 'triton', [torch.zeros(1)])"
    assert "the tensors are on the CPU and Triton compiles for GPUs" in run(code, TRITON_INTERPRET="0").stderr


def test_importing_the_package_imports_nothing() -> None:
    done = run("import sys, kernels; print('torch' in sys.modules, kernels.explain.__name__)")
    assert done.stdout.split() == ["False", "explain"]
