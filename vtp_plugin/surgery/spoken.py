"""Methods of a cache that speak for its caller, and whether somebody else is asking: the model, or the host's loop."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_inside = threading.local()


@contextmanager
def inside() -> Iterator[None]:
    """While open, this thread is inside a pass of the model."""
    _inside.depth = getattr(_inside, "depth", 0) + 1
    try:
        yield
    finally:
        _inside.depth -= 1


@contextmanager
def generating() -> Iterator[None]:
    """While open, this thread is inside of the host's `generate`."""
    _inside.generating = getattr(_inside, "generating", 0) + 1
    try:
        yield
    finally:
        _inside.generating -= 1


def in_generate() -> bool:
    """Whether this thread is inside of the host's `generate`."""
    return getattr(_inside, "generating", 0) > 0


class OfCache:
    """A method of one cache that a pruned prompt is in, in the place of its class's own.

    The cache holds it, so it does not hold the cache: keys and values end with the last name for them, and not when
    the garbage collector finds a circle. Copied and pickled with its cache, it belongs to the copy.
    """

    def __init__(self, stored: Any, said: Any) -> None:
        self.stored, self.said = weakref.ref(stored), said

    def __deepcopy__(self, memo: dict[int, Any]) -> OfCache:
        stored = self.stored()
        return type(self)(memo.get(id(stored), stored), self.said)

    def __getstate__(self) -> tuple[Any, Any]:
        return self.stored(), self.said

    def __setstate__(self, state: tuple[Any, Any]) -> None:
        self.__init__(*state)


class Spoken(OfCache):
    """`get_seq_length`: the caller's columns (so many more are `said`) outside of the model, what is stored inside."""

    def __call__(self, layer_idx: int = 0) -> int:
        stored = self.stored()
        length = type(stored).get_seq_length(stored, layer_idx)
        return length if getattr(_inside, "depth", 0) or not length else length + self.said
