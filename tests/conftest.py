"""Seeds for every test, and a cache folder that is the test session's own."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before anything imports torch


def pytest_configure(config: pytest.Config) -> None:
    """Ordinary tests run the Triton kernels in Triton's interpreter, on the CPU; ``-m gpu`` runs them natively."""
    expression = str(config.getoption("markexpr"))
    if "gpu" not in expression.replace("not gpu", ""):
        os.environ.setdefault("TRITON_INTERPRET", "1")


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


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["FOVEA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def shared_data() -> Path:
    """Real slides and bags beside a development checkout; tests that use them are skipped elsewhere."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real inputs is not beside this checkout")
    return folder
