"""One command at a time in a folder: a lock that says who holds it, and that ends with its process.

    with locks.held(folder):        # RunError with the other's host, process, command and time where another has it
        ...

The lock is the system's (`flock`) on the file `lock` in the folder, so it is gone when its process is, however that
died; what the file says is read by whoever finds it locked. A file that a dead process left is no lock.
Where the file system or the system has no such locks, nothing is locked, and that is said.
"""

import contextlib
import datetime
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from experiments.common.files import RunError
from experiments.common.runs import LOCK


class InUse(RunError):
    """Another process holds the lock of a folder."""


@contextlib.contextmanager
def held(folder: Path, wait: bool = False) -> Iterator[None]:
    """Makes the folder if need be, and holds its lock.

    Args:
      folder: what is locked; what lies in it may be deleted meanwhile, but for the lock.
      wait: whether to wait for another process; else that is an error.

    Raises:
      InUse: another process has it; nothing was touched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = _take(path, wait)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, (json.dumps(_me()) + "\n").encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: nobody else's
        os.close(descriptor)


def refuse(folder: Path) -> None:
    """Raises InUse where another process holds the folder's lock; looks only, makes nothing."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
        try:
            _lock(descriptor, folder / LOCK, wait=False)
        finally:
            os.close(descriptor)


def _take(path: Path, wait: bool) -> int:
    """An open file that is locked, and that still has its name: whoever had it before deletes it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, path, wait)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path, wait: bool) -> None:
    """Locks an open file, or raises InUse."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise InUse(
            f"{path.parent} is in use by {_who(path)}; wait until that has ended, or choose another --out"
        ) from None
    except OSError as error:
        print(f"{path.parent} cannot be locked ({error.strerror}): start no second command there", file=sys.stderr)


def _me() -> dict[str, str | int]:
    since = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "command": shlex.join(sys.orig_argv)}


def _who(path: Path) -> str:
    """What the holder wrote of itself."""
    try:
        it = json.loads(path.read_text())
        return f"process {it['pid']} on {it['host']} since {it['since']} ({it['command']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has not written it yet
        return "another process"
