"""The compile gate runs beside the other tests: it takes minutes of a core that they leave idle."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SESSION

ROOT = Path(__file__).parents[2]
TRITON = importlib.util.find_spec("triton") is not None
GATE = "test_every_configuration_compiles_within_its_bounds"


@dataclass
class CompileGate:
    """``python -m kernels.bench --static`` in a process of its own, without the interpreter, at the lowest priority.

    Where several workers share the tests, one of them starts it, any may ask for its result, and the session's own
    process stops it.
    """

    folder: Path

    def start(self) -> None:
        """Begin compiling."""
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self.folder.mkdir()
        script = f"{shlex.quote(sys.executable)} -m kernels.bench --static --json static.part; echo $? > code.part"
        with (self.folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                ["sh", "-c", f"cd {shlex.quote(str(self.folder))}; {script}; mv code.part code"],
                env=environment | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=lambda: os.nice(19) and None,
            )
        (self.folder / "process").write_text(str(process.pid))
        process.returncode = 0  # it outlives this object on purpose, of which Python would warn

    def result(self) -> tuple[int, list[dict[str, Any]], str]:
        """Exit code, the table's rows and the standard error, when all is compiled."""
        while not (self.folder / "code").exists():
            time.sleep(0.2)
        code, path = int((self.folder / "code").read_text()), self.folder / "static.part"
        return code, json.loads(path.read_text()) if path.exists() else [], (self.folder / "stderr").read_text()

    def stop(self) -> None:
        """Kill what is still compiling."""
        with contextlib.suppress(OSError, ValueError):
            os.killpg(int((self.folder / "process").read_text()), signal.SIGKILL)


def _gate() -> CompileGate:
    return CompileGate(Path(os.environ[SESSION]) / "compile-gate")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The gate's result is asked for last."""
    items.sort(key=lambda item: item.name == GATE)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the gate when its test is among those to be run."""
    starts = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0" and not session.config.option.collectonly
    if starts and TRITON and any(item.name == GATE for item in session.items):
        _gate().start()


def pytest_sessionfinish() -> None:
    """Leave nothing running."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _gate().stop()


@pytest.fixture
def compile_gate() -> CompileGate:
    """The gate that was started when the tests were collected."""
    if not TRITON:
        pytest.skip("Triton is not installed")
    return _gate()
