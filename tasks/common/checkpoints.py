"""Trained models on disk: safetensors with a JSON description in their header, one file per fold of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kernels.errors import InputError
from tasks.common.crossval import Fold
from tasks.common.files import atomic_path

FILE_NAME = "model.safetensors"


def write_model(path: Path, state: Mapping[str, Tensor], task: str, description: Mapping[str, Any]) -> None:
    """Write a state dict with what it says of itself, atomically."""
    with atomic_path(path) as temporary:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in state.items()},
            temporary,
            metadata={f"fovea_{task}": json.dumps(description, sort_keys=True)},
        )


def read_model(path: Path, task: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and description of a file of :func:`write_model`.

    Raises:
        InputError: the file is missing, damaged, or of another task.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist; give a run folder, a fold folder or a {FILE_NAME}.")
    try:
        with safe_open(path, framework="pt") as handle:
            header = (handle.metadata() or {}).get(f"fovea_{task}")
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint {path} cannot be read ({error}); it may be cut short: copy it again.") from error
    if header is None:
        raise InputError(f"checkpoint {path} was not written by tasks.{task}; give the {FILE_NAME} of a training run.")
    return state, json.loads(header)


def fold_name(fold: Fold) -> str:
    """Folder of a fold inside its run; :func:`find_checkpoints` looks for these."""
    return f"fold_{fold.index:02d}"


def hashed(case_id: str) -> str:
    """A short hash of an id: tells later whether a case was trained on without carrying the id along."""
    return hashlib.sha256(case_id.encode()).hexdigest()[:16]


def find_checkpoints(path: Path) -> list[Path]:
    """The model files meant by a path: the file itself, a fold's, or those of all folds of a run."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"checkpoint={path} does not exist; give a run folder, a fold folder or a {FILE_NAME}.")
    if path.is_file():
        return [path]
    found = [path / FILE_NAME] if (path / FILE_NAME).is_file() else sorted(path.glob(f"fold_*/{FILE_NAME}"))
    if not found:
        raise InputError(
            f"checkpoint={path} holds no {FILE_NAME} and no finished fold; train first, or give another folder."
        )
    return found
