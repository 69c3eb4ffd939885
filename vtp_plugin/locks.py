"""One process at a time in a place of results: a second one is told so, and one that was killed blocks nobody.

The system lets go of a lock when its process ends, however that ends.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import filelock

from vtp_plugin.errors import PruningError

LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of a file system that has none


@contextmanager
def folder(path: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is not there, and is gone again if nothing comes of it.

    PruningError if another process works in it.
    """
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with _held(path.resolve() / LOCK, f"another process is at work in {path}"):
            yield
    finally:
        if new:
            with suppress(OSError):  # it is not empty
                path.rmdir()


@contextmanager
def file(path: Path) -> Iterator[None]:
    """Hold a file that is written again and again, there or not yet. PruningError if another process writes it."""
    target = Path(os.path.realpath(path))
    with _held(target.with_name(f".{target.name}{LOCK}"), f"another process is writing {path}"):
        yield


@contextmanager
def _held(path: Path, taken: str) -> Iterator[None]:
    """Hold a lock; one that is held further out already is kept."""
    lock = _lock(path)
    if lock.is_locked:
        yield
        return
    try:
        lock.acquire()
    except filelock.Timeout:
        raise PruningError(f"{taken}: wait until it has ended, or name another place (-o)") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise PruningError(f"cannot write '{path}': {error.strerror}") from None
    except NotImplementedError:  # what filelock makes of NO_LOCKS, before 3.21
        pass
    try:
        yield
    finally:
        with suppress(OSError):  # a system that deletes no open file keeps it
            path.unlink()
        lock.release()


@cache
def _lock(path: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(path, timeout=0)
