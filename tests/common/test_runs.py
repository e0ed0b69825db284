"""Run folders: claimed once, resumed after a crash, never overwritten."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from kernels.errors import InputError
from tasks.common.runs import open_run


def config(**changes: object) -> DictConfig:
    return OmegaConf.create({"task": "t", "out": "x", "resume": True, "dry_run": False, "seed": 1, **changes})


@pytest.fixture
def dated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the dated runs of task 't' lie, seen from the working folder."""
    monkeypatch.chdir(tmp_path)
    return Path("outputs") / "t"


def test_an_unfinished_run_of_the_same_configuration_is_continued(dated: Path) -> None:
    with pytest.raises(RuntimeError), open_run(config(), dated / "first") as run:
        assert not run.resumed
        raise RuntimeError("killed")
    with open_run(config(), dated / "second") as run:
        assert run.resumed
        assert run.folder == dated / "first"
        run.finish()
    with open_run(config(), dated / "third") as run:
        assert not run.resumed
        assert run.folder == dated / "third"


def test_another_configuration_or_resume_false_starts_afresh(dated: Path) -> None:
    with open_run(config(), dated / "first"):
        pass
    with open_run(config(seed=2), dated / "second") as run:
        assert run.folder == dated / "second"
    with open_run(config(resume=False), dated / "third") as run:
        assert run.folder == dated / "third"


def test_a_folder_named_by_the_user_stands_for_itself(dated: Path) -> None:
    with open_run(config(), dated / "first"):
        pass
    with open_run(config(), Path("elsewhere")) as run:
        assert not run.resumed
        assert run.folder == Path("elsewhere")


def test_changed_input_files_make_another_run(dated: Path) -> None:
    labels = Path("labels.csv")
    labels.write_text("a")
    with open_run(config(), dated / "first", [labels]):
        pass
    labels.write_text("b")
    with open_run(config(), dated / "second", [labels]) as run:
        assert not run.resumed


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    with open_run(config(), tmp_path / "a"):
        pass
    with pytest.raises(InputError, match="another configuration"), open_run(config(seed=3), tmp_path / "a"):
        pass
    with pytest.raises(InputError, match="resume=false"), open_run(config(resume=False), tmp_path / "a"):
        pass


def test_a_finished_run_in_the_folder_named_is_not_repeated(tmp_path: Path) -> None:
    with open_run(config(), tmp_path / "a") as run:
        run.finish()
    with open_run(config(), tmp_path / "a") as run:
        assert run.finished


def test_two_processes_cannot_share_a_folder_and_a_dead_one_leaves_no_lock(tmp_path: Path) -> None:
    holder = f"""
import sys
sys.path.insert(0, {str(Path.cwd())!r})
from pathlib import Path
from omegaconf import OmegaConf
from tasks.common.runs import open_run
cfg = OmegaConf.create({OmegaConf.to_container(config())!r})
with open_run(cfg, Path({str(tmp_path / "a")!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"held\n"
    try:
        with pytest.raises(InputError, match="in use"), open_run(config(), tmp_path / "a"):
            pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()
    with open_run(config(), tmp_path / "a") as run:
        assert run.resumed


def test_the_saved_configuration_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.csv").write_text("")
    with open_run(config(data={"labels": "labels.csv"}), tmp_path / "a"):
        pass
    saved = OmegaConf.load(tmp_path / "a" / "config.yaml")
    assert saved.data.labels == str(tmp_path / "labels.csv")
    assert saved.seed == 1
    assert saved.hydra.searchpath == ["pkg://conf"]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["status"] == "unfinished"
    assert "python" in record["versions"]
