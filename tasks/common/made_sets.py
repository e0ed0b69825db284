"""Data sets that a demo makes: once, in the cache folder, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kernels.errors import InputError
from tasks.common.files import cache_folder, explain_os_errors

log = logging.getLogger(__name__)

_MARKER = "demo.json"


def made_once(
    name: str,
    wanted: Mapping[str, Any],
    write: Callable[[Path], None],
    folder: Path | None = None,
    said: str = "",
) -> Path:
    """The folder of a made data set; ``write`` fills it unless it is there.

    Args:
        name: of the set: ``data.<name>`` is its section, ``demo_<name>_...`` its folder.
        wanted: everything that what is written follows from, a version among it.
        write: fills an empty folder; if it fails, nothing is left.
        folder: where the set is kept; None: a folder of the cache, named after ``wanted``.
        said: what was made, for the log, such as "24 heads".

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:10]
    folder = cache_folder() / f"demo_{name}_{digest}" if folder is None else folder
    marker = folder / _MARKER
    if marker.is_file() and json.loads(marker.read_text()) == wanted:
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"data.{name}.folder={folder} holds other files; choose an empty folder.")
    with explain_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".demo_{name}.", dir=folder.parent))
        try:
            write(temporary)
            (temporary / _MARKER).write_text(json.dumps(wanted))
            temporary.chmod(0o755)
            try:
                temporary.replace(folder)
            except OSError:  # another process was quicker
                if not marker.is_file():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    log.info("made %s in %s", said or "the data", folder)
    return folder
