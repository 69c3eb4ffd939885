"""Whose call it is: one thread's at a time, and the model inside of what others put around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from threading import RLock, get_ident, local

import torch
from torch import nn

from vtp_plugin.surgery.call import Call

NUMBERS = count()
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


_running = local()


def anyone() -> bool:
    """Whether this thread is inside of some attached model; parts may be shared with another one."""
    return getattr(_running, "depth", 0) > 0


class OneAtATime:
    """Calls of one attached model. Features are served to whoever asks the model, so threads wait for each other."""

    def __init__(self) -> None:
        self.number = next(NUMBERS)  # of this attachment
        self._call: Call | None = None
        self._lock, self._owner = RLock(), 0

    @property
    def call(self) -> Call | None:
        """The call that this thread is in."""
        return self._call if torch.compiler.is_compiling() or self._owner == get_ident() else None

    @property
    def mine(self) -> bool:
        """Whether this thread is inside of the model, in a call or aside of one."""
        return self._owner == get_ident()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else's call runs meanwhile: other threads wait. A call inside a call goes on."""
        with self._lock:
            before, self._owner = self._owner, get_ident()
            _running.depth = getattr(_running, "depth", 0) + 1
            try:
                yield
            finally:
                self._owner = before
                _running.depth -= 1

    @contextmanager
    def going_on(self, call: Call | None) -> Iterator[Call | None]:
        """A call that was counted before goes on (None: as if there were none), inside of another, perhaps."""
        with self.alone():
            outer, self._call = self._call, call
            try:
                yield call
            finally:
                self._call = outer

    def aside(self) -> AbstractContextManager[None]:
        """A pass inside a call that has nothing to do with its prompt."""
        return self.going_on(None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what PEFT, torch.compile and data parallelism put around it: what is attached works there."""
    while True:
        inner = getattr(model, "get_base_model", None)
        inner = inner() if callable(inner) else getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in WRAPPERS:
            inner = model.module
        if inner is None or inner is model:
            return model
        model = inner
