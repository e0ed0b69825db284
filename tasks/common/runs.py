"""Run folders: claimed by one process, resumed when a run of the same configuration was cut short, repeatable."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kernels.errors import InputError
from tasks.common.files import atomic_path, explain_os_errors, try_os_lock

log = logging.getLogger(__name__)

# Settings that say where and how to run but not what: they do not make another run.
_NOT_PART_OF_A_RUN = ("out", "resume", "dry_run")
_RECORD = "run.json"
COMPARISON = "comparison.csv"  # what a sweep leaves at its end

# A saved configuration stands alone: it brings the shared Hydra settings, and a new folder for each repetition.
_SAVED_HEADER = """\
# The resolved configuration of this run. Repeat it with: python -m tasks.{task} --config-path {folder}
defaults:
  - _self_
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
hydra:
  searchpath: ["pkg://conf"]
  run: {{dir: "${{out}}"}}
  sweep: {{dir: "${{out}}", subdir: "${{hydra.job.num}}"}}
  output_subdir: null
  job: {{chdir: false, name: {task}}}
"""


@dataclass
class Run:
    """One run folder.

    Attributes:
        folder: where everything of the run is written.
        resumed: the folder held an unfinished run of the same configuration.
        finished: the folder holds the finished run already; nothing is to be done.
    """

    folder: Path
    resumed: bool
    finished: bool = False

    def finish(self) -> None:
        """Mark the run as finished; it is not resumed any more."""
        record = json.loads((self.folder / _RECORD).read_text())
        _write_json(self.folder / _RECORD, {**record, "status": "finished", "ended": _now()})


@contextlib.contextmanager
def open_run(cfg: DictConfig, folder: Path, inputs: Sequence[Path | bytes] = ()) -> Iterator[Run]:
    """Claim the folder for this configuration for as long as the block runs.

    When ``cfg.resume`` is set, ``folder`` is a dated one under ``outputs/<task>``, and an unfinished run of the
    same configuration lies there too, that one is continued instead. A folder that holds another run is refused.

    Args:
        inputs: files whose contents are part of the configuration, such as the labels, or such contents themselves.

    Raises:
        InputError: the folder holds a run of another configuration, is in use, or cannot be written.
    """
    fingerprint = _fingerprint(cfg, inputs)
    rank = global_rank()
    chosen = folder
    if cfg.resume and not (folder / _RECORD).exists():
        # The other processes of a distributed run look for the folder that the first one holds.
        chosen = _unfinished_beside(folder, Path("outputs") / cfg.task, fingerprint, also_in_use=rank > 0) or folder
    record = _read_record(chosen)
    if record is not None and record["fingerprint"] != fingerprint:
        raise InputError(
            f"out={chosen} holds a run of another configuration; choose another folder or delete that one."
        )
    if record is not None and not cfg.resume:
        raise InputError(
            f"out={chosen} holds a run already and resume=false; choose another folder or delete that one."
        )
    with explain_os_errors(chosen):
        chosen.mkdir(parents=True, exist_ok=True)
    if rank:  # the first process of a distributed run holds the folder
        yield Run(chosen, resumed=record is not None, finished=False)
        return
    with _lock(chosen), _log_file(chosen):
        if record is not None and record["status"] == "finished":
            yield Run(chosen, resumed=True, finished=True)
            return
        if record is None:
            _write_config(cfg, chosen)
            _write_json(chosen / _RECORD, _new_record(fingerprint))
        else:
            log.info("going on with the unfinished run in %s", chosen)
        yield Run(chosen, resumed=record is not None)


def _fingerprint(cfg: DictConfig, inputs: Sequence[Path | bytes]) -> str:
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    for key in _NOT_PART_OF_A_RUN:
        content.pop(key, None)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    for item in inputs:
        digest.update(item if isinstance(item, bytes) else Path(item).read_bytes())
    return digest.hexdigest()[:16]


def global_rank() -> int:
    """0 in an ordinary process and in the first one of a distributed run, more in the others."""
    slurm = os.environ.get("SLURM_PROCID", "0") if int(os.environ.get("SLURM_NTASKS", "1")) > 1 else "0"
    return (
        int(os.environ.get("RANK", slurm))
        or int(os.environ.get("LOCAL_RANK", "0"))
        or int(os.environ.get("NODE_RANK", "0"))
    )


def _unfinished_beside(folder: Path, root: Path, fingerprint: str, also_in_use: bool = False) -> Path | None:
    """The newest unfinished run of this configuration among the dated runs of the task, also inside sweeps.

    A folder the user chose stands for itself: what lies elsewhere is not looked at.
    """
    if root.resolve() not in folder.resolve().parents:
        return None
    found = []
    for pattern in (f"*/{_RECORD}", f"*/*/{_RECORD}"):
        for path in root.glob(pattern):
            record = _read_record(path.parent)
            if record is None or record["fingerprint"] != fingerprint:
                continue
            # A finished job of a sweep that was cut short before its comparison was written is not done again.
            of_broken_sweep = pattern.count("*") == 2 and not (path.parent.parent / COMPARISON).exists()
            if record["status"] != "finished" or of_broken_sweep:
                found.append((record["started"], path.parent))
    for _, candidate in sorted(found, reverse=True):
        if also_in_use or not _in_use(candidate):
            return candidate
    return None


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / _RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise InputError(f"{folder / _RECORD} is damaged; delete the folder or choose another with out=DIR.") from error
    return record if isinstance(record, dict) and "fingerprint" in record else None


def _new_record(fingerprint: str) -> dict[str, Any]:
    packages = ("fovea-toolkit", "torch", "lightning", "timm", "numpy", "openslide-python", "monai")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "fingerprint": fingerprint,
        "status": "unfinished",
        "started": _now(),
        "command": " ".join(sys.argv),
        "host": platform.node(),
        "versions": versions,
    }


def _write_config(cfg: DictConfig, folder: Path) -> None:
    """The resolved configuration, with paths made absolute so that it can be repeated from anywhere."""
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    content["out"] = "outputs/${task}/${now:%Y-%m-%d_%H-%M-%S}"
    _make_paths_absolute(content)
    text = _SAVED_HEADER.format(task=cfg.task, folder=folder)
    with atomic_path(folder / "config.yaml") as temporary:
        temporary.write_text(text + OmegaConf.to_yaml(OmegaConf.create(content)))


def _make_paths_absolute(node: dict[Any, Any]) -> None:
    for key, value in node.items():
        if isinstance(value, dict):
            _make_paths_absolute(value)
        # A bare word such as 'acmil' may happen to be a file here; only what looks like a path is one.
        elif isinstance(value, str) and key != "out" and ("/" in value or "." in value) and Path(value).exists():
            node[key] = str(Path(value).resolve())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def _in_use(folder: Path) -> bool:
    if not (folder / ".lock").exists():
        return False
    with (folder / ".lock").open("a") as handle:
        return not try_os_lock(handle)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with explain_os_errors(folder / ".lock"):
        handle = (folder / ".lock").open("a")
    with handle:
        if not try_os_lock(handle):
            raise InputError(f"out={folder} is in use by another process; wait for it or choose another folder.")
        yield


@contextlib.contextmanager
def _log_file(folder: Path) -> Iterator[None]:
    with explain_os_errors(folder / "run.log"):
        handler = logging.FileHandler(folder / "run.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
