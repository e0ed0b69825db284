"""Lock files, so that several processes (a cluster's job array on one folder) share a cohort and never a slide.

A lock is a small JSON file that names its process and host. While it is held its time is renewed; a lock whose process
is dead on this host, or that has not been renewed for minutes, is stale and taken over. Whoever removes a lock that is
not its own does so under a guard that only one process can hold, and judges the lock anew under it: between judging and
removing, the file of that name may have become another's, live one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from tasks.common.files import explain_os_errors, try_os_lock

RENEW_SECONDS = 20.0
STALE_SECONDS = 300.0


class FileLock:
    """A lock file; ``acquire`` takes it without waiting.

    >>> import tempfile
    >>> lock = FileLock(Path(tempfile.mkdtemp()) / "a.lock")
    >>> lock.acquire(), FileLock(lock.path).acquire()
    (True, False)
    >>> lock.release()
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()

    def acquire(self) -> bool:
        """Take the lock; False when another process holds it (see ``holder``)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._create() and not (self._is_stale() and self._take_over()):
            return False
        self._stop.clear()
        threading.Thread(target=self._renew, name=f"lock {self.path.name}", daemon=True).start()
        return True

    def release(self) -> None:
        """Give the lock back, unless it was taken over."""
        self._stop.set()
        if self._read().get("token") == self._token:
            self.path.unlink(missing_ok=True)

    def holder(self) -> str:
        """Who has the lock, for a message."""
        about = self._read()
        return f"process {about.get('pid', '?')} on {about.get('host', '?')}"

    def _create(self) -> bool:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "token": self._token}
        with explain_os_errors(self.path):
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            with os.fdopen(handle, "w") as file:
                json.dump(about, file)
        return True

    def _read(self) -> dict[str, object]:
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _is_stale(self) -> bool:
        about = self._read()
        pid = about.get("pid")
        if about.get("host") == socket.gethostname() and isinstance(pid, int) and not _alive(pid):
            return True
        try:
            return time.time() - self.path.stat().st_mtime > STALE_SECONDS
        except FileNotFoundError:  # given back this moment: nothing to take over
            return False

    def _take_over(self) -> bool:
        """Replace a lock that is stale by one of ours; False when another process was first."""
        with self._guard() as alone:
            if not alone or not self._is_stale():
                return False
            self.path.unlink(missing_ok=True)
            return self._create()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[bool]:
        """Whether this process alone may remove the lock of another; the guard's file is gone afterwards."""
        path = self.path.with_name(f"{self.path.name}.guard")
        with explain_os_errors(path), path.open("a") as handle:
            alone = try_os_lock(handle) and _same_file(path, handle.fileno())
            try:
                yield alone
            finally:
                if alone:
                    path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                os.utime(self.path)
            except OSError:
                return


def _same_file(path: Path, handle: int) -> bool:
    """Whether the path still names the open file: its last holder removes the guard."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
