"""Writing files so that a killed run leaves either the whole file or none, and ids that are safe as file names."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from kernels.errors import InputError

_FULL_OR_READ_ONLY = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
}


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that is renamed to it when the block ends well and removed otherwise.

    The temporary name starts with a dot and keeps the suffix, so that writers which look at the suffix work.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".partial{path.suffix}", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def explain_os_errors(path: str | Path) -> Iterator[None]:
    """Turn 'disk full' and 'not writable' into one sentence that names the file."""
    try:
        yield
    except OSError as error:
        reason = _FULL_OR_READ_ONLY.get(error.errno or 0)
        # HDF5 reports a full disk as a plain OSError whose text carries the errno.
        if reason is None and "errno = 28" in str(error):
            reason = _FULL_OR_READ_ONLY[errno.ENOSPC]
        if reason is None:
            raise
        raise InputError(
            f"cannot write {error.filename or path}: {reason}; free some space or choose another folder with out=DIR."
        ) from error


def try_os_lock(handle: IO[str]) -> bool:
    """Lock an open file without waiting; False when another process or handle has it.

    An advisory lock, which the operating system drops when the process dies, however it dies.
    """
    try:
        import fcntl
    except ImportError:  # Windows has none; two processes at one file are then not told apart
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, as some network mounts
        return True
    return True


def safe_id(identifier: str, where: str) -> str:
    """``identifier`` if it can be a file name as it stands.

    Args:
        where: the file and row or column it came from, for the message.

    Raises:
        InputError: it is empty, too long, starts with a dot, or holds a path separator or control character.
    """
    bad = (
        not identifier
        or identifier != identifier.strip()
        or identifier.startswith(".")
        or len(identifier.encode()) > 200
        or any(c in '/\\:*?"<>|' or ord(c) < 32 for c in identifier)
    )
    if bad:
        raise InputError(
            f"{where}: id {identifier!r} cannot be used as a file name; use letters, digits, '.', '_' and '-'."
        )
    return identifier


def cache_folder() -> Path:
    """Where files that can be made again are kept: ``$FOVEA_CACHE``, or ``fovea`` in the user's cache folder."""
    if chosen := os.environ.get("FOVEA_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fovea"


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON, atomically; NaN and infinity are kept, as Python writes them."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=True))


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
