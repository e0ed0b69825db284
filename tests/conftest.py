"""Seeds for every test, and folders that are the test session's own, shared by its workers."""

import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tests share the cores; before anything imports torch
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a worker per core

SESSION = "FOVEA_TEST_SESSION"
"""Names the session's folder in the environment of its workers and of the processes that tests start."""


def pytest_configure(config: pytest.Config) -> None:
    """Ordinary tests run the Triton kernels in Triton's interpreter, on the CPU; ``-m gpu`` runs them natively."""
    expression = str(config.getoption("markexpr"))
    if "gpu" not in expression.replace("not gpu", ""):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[SESSION] = tempfile.mkdtemp(prefix="fovea-tests-")
    os.environ["FOVEA_CACHE"] = str(Path(os.environ[SESSION]) / "cache")


def pytest_unconfigure() -> None:
    """The session's folder goes with it."""
    if "PYTEST_XDIST_WORKER" not in os.environ and SESSION in os.environ:
        shutil.rmtree(os.environ.pop(SESSION), ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quick_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's check of integer overflow doubles its time; tests named after it keep it."""
    if "triton.runtime.interpreter" in sys.modules and "overflow" not in request.node.name:
        builder = sys.modules["triton.runtime.interpreter"].interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


@pytest.fixture
def shared_data() -> Path:
    """Real slides and bags beside a development checkout; tests that use them are skipped elsewhere."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real inputs is not beside this checkout")
    return folder
