"""The processes of an engine end with the process that started them, however that one ended.

vLLM's own clean-up runs where the starting process exits by itself. One that is killed cannot clean up: its engine
would be left to init, with all the memory that it holds. So while an engine is started here, its processes, forked or
spawned, are told to watch the one that started them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Thread

VARIABLE = "VTP_ENDS_WITH"  # for the processes that are started: the process that starts the engine
POLL, GRACE = 0.5, 10.0  # seconds


@contextmanager
def none_left() -> Iterator[None]:
    """While open, processes that are started end with this one."""
    _watch_forks()
    os.environ[VARIABLE] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[VARIABLE]


@cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_forked)


def _forked() -> None:
    watch.cache_clear()  # that of the process which forked
    watch()


@cache
def watch() -> None:
    """Called in every process of an engine: end with the one that started it, if that was asked for."""
    if os.environ.get(VARIABLE) not in (None, str(os.getpid())):
        Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    os.kill(os.getpid(), signal.SIGTERM)  # vLLM ends its own processes on that
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)
