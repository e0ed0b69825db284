"""A lock is held by one process; a dead one's is taken over."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from tasks.wsi_mil import locks
from tasks.wsi_mil.locks import FileLock


def test_only_one_holds_a_lock_until_it_is_released(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "l" / "a.lock"), FileLock(tmp_path / "l" / "a.lock")
    assert first.acquire()
    assert not second.acquire()
    assert second.holder() == f"process {os.getpid()} on {socket.gethostname()}"
    second.release()  # not its own
    assert first.path.exists()
    first.release()
    assert second.acquire()
    second.release()
    assert list(first.path.parent.iterdir()) == []


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    code = f"from pathlib import Path; from tasks.wsi_mil.locks import FileLock; import os, signal\n\
assert FileLock(Path({str(path)!r})).acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert path.exists()
    lock = FileLock(path)
    assert lock.acquire()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()


def test_the_lock_of_another_host_is_respected_until_it_is_no_longer_renewed(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "token": "x"}))
    lock = FileLock(path)
    assert not lock.acquire()
    assert lock.holder() == "process 1 on elsewhere"
    old = time.time() - locks.STALE_SECONDS - 1
    os.utime(path, (old, old))
    assert lock.acquire()
    lock.release()


def test_a_held_lock_is_renewed(tmp_path: Path) -> None:
    before = locks.RENEW_SECONDS
    locks.RENEW_SECONDS = 0.01
    try:
        lock = FileLock(tmp_path / "a.lock")
        assert lock.acquire()
        os.utime(lock.path, (1, 1))
        give_up = time.monotonic() + 5
        while lock.path.stat().st_mtime < 1000 and time.monotonic() < give_up:
            time.sleep(0.01)
        assert lock.path.stat().st_mtime > 1000
        lock.release()
    finally:
        locks.RENEW_SECONDS = before


def test_an_empty_lock_file_is_not_stale_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.lock").touch()  # another process is just writing it
    assert not FileLock(tmp_path / "a.lock").acquire()


def test_many_that_want_one_lock_never_hold_it_together(tmp_path: Path) -> None:
    path, rounds, inside, most = tmp_path / "a.lock", 25, [], []

    def work() -> None:
        for _ in range(rounds):
            lock = FileLock(path)
            while not lock.acquire():
                time.sleep(0.0002)
            inside.append(lock)
            most.append(len(inside))
            time.sleep(0.0002)
            inside.remove(lock)
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 8 * rounds and max(most) == 1
    assert list(tmp_path.iterdir()) == []


def test_of_many_only_one_takes_a_stale_lock_over(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    for _ in range(40):
        path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "token": "x"}))
        os.utime(path, (1, 1))
        together, got = threading.Barrier(8), []

        def work(together: threading.Barrier = together, got: list[FileLock] = got) -> None:
            lock = FileLock(path)
            together.wait()
            if lock.acquire():
                got.append(lock)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        got[0].release()
    assert list(tmp_path.iterdir()) == []
