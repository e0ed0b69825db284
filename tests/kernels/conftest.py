"""The compile gate runs beside the other tests: it takes minutes of a core that they leave idle."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GATE = "test_every_configuration_compiles_within_its_bounds"


@dataclass
class CompileGate:
    """``python -m kernels.bench --static`` in a process of its own, without the interpreter, at the lowest priority."""

    folder: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, folder: Path) -> CompileGate:
        """Begin compiling."""
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        with (folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "kernels.bench", "--static", "--json", str(folder / "static.json")],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=lambda: os.nice(19) and None,
            )
        return cls(folder, process)

    def result(self) -> tuple[int, list[dict[str, Any]], str]:
        """Exit code, the table's rows and the standard error, when all is compiled."""
        code = self.process.wait()
        path = self.folder / "static.json"
        return code, json.loads(path.read_text()) if path.exists() else [], (self.folder / "stderr").read_text()

    def stop(self) -> None:
        """Kill what is still compiling."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_gate: CompileGate | None = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The gate's result is asked for last."""
    items.sort(key=lambda item: item.name == GATE)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the gate when its test is among those to be run."""
    global _gate
    chosen = [item for item in session.items if item.name == GATE]
    if chosen and not session.config.option.collectonly and importlib.util.find_spec("triton") is not None:
        _gate = CompileGate.start(Path(tempfile.mkdtemp(prefix="compile-gate-")))


def pytest_sessionfinish() -> None:
    """Leave nothing running."""
    if _gate is not None:
        _gate.stop()


@pytest.fixture
def compile_gate() -> CompileGate:
    """The gate that was started when the tests were collected."""
    if _gate is None:
        pytest.skip("Triton is not installed")
    return _gate
