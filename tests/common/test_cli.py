"""The command line: quick answers, one sentence for a mistake, a non-zero exit code, no stack trace."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def command(*arguments: str, cwd: Path, module: str = "tasks.wsi_mil") -> subprocess.CompletedProcess[str]:
    """Run a task as a user would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_list_of_tasks_has_one_line_each(tmp_path: Path) -> None:
    done = command(cwd=tmp_path, module="tasks")
    assert done.returncode == 0
    assert any(line.split()[:2] == ["wsi_mil", "Whole-slide-image"] for line in done.stdout.splitlines())


def test_help_shows_groups_options_and_examples_without_heavy_imports(tmp_path: Path) -> None:
    start = time.perf_counter()
    done = command("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert time.perf_counter() - start < 10  # about 0.1 s; importing torch alone would take longer on a slow disk
    for expected in ("action=predict", "+attention: abmil, acmil", "backbone:", "epochs: 50", "mpp:"):
        assert expected in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data.titl=224"], "Did you mean 'data.tile'?"),
        (["+data.titl=224"], "Did you mean 'data.tile'?"),
        (["traning.lr=1"], "Did you mean 'training.lr'?"),
        (["+attention=acmill"], "Did you mean 'acmil'?"),
        (["attention=acmil"], "+attention=acmil"),
        (["backbone=resnet81"], "backbone 'resnet81' is not known"),
        (["data=mil_benchmrk"], "Did you mean 'mil_benchmark'?"),
        (["data=mil_benchmark", "data.mpp=1"], "does not go with the data set chosen"),
        (["training.lr=fast"], "takes a number, not 'fast'"),
        (["training.epochs=2.5"], "takes a whole number"),
        (["resume=maybe"], "true or false"),
        (["action=evaluat"], "Did you mean 'evaluate'?"),
        (["action=evaluate"], "checkpoint="),
        (["nonsense"], "key=value"),
        (["kernels=tritn"], "Did you mean 'triton'?"),
        (["kernels.backend=tritn"], "Did you mean 'triton'?"),
        ([f"out={__file__}/x"], "is a file; choose a folder"),
        (["--config-path", "nowhere"], "holds no config.yaml"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["run", "mine", "mine/run"])
def test_only_folders_that_it_made_go_again(out: str, tmp_path: Path) -> None:
    here = tmp_path / "project"
    (here / "mine").mkdir(parents=True)
    assert command("action=evaluate", f"out={out}", cwd=here).returncode == 2
    assert [path.name for path in here.iterdir()] == ["mine"] and not list((here / "mine").iterdir())
    (here / "mine").rmdir()
    assert command("action=evaluate", f"out={here}/{out}", cwd=here).returncode == 2
    assert here.is_dir() and not list(here.iterdir())


def test_a_failed_job_of_a_sweep_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    done = command("-m", "action=evaluate,predict", cwd=tmp_path)
    assert done.returncode == 2
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 2
    assert "Traceback" not in done.stderr


def test_the_kernels_implementation_is_an_option_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    import kernels
    from kernels.backend import choose
    from tasks.common import cli

    monkeypatch.setitem(cli.KERNEL_VARIABLES, "backend", ("FOVEA_KERNELS", None))
    monkeypatch.delenv("FOVEA_KERNELS", raising=False)
    try:
        for chosen, reason in (("reference", "backend='reference' of the process"), ("auto", "")):
            cli._choose_kernels({"kernels": {"backend": chosen, "autotune": False}})  # type: ignore[arg-type]
            assert os.environ.get("FOVEA_KERNELS", "auto") == chosen
            assert choose("varlen_attention", "auto", []).reason.startswith(reason)
    finally:
        kernels.configure("auto", False)
