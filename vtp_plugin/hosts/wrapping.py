"""One way to step between a host and one of its functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def wrap(owner: Any, name: str, around: Callable) -> None:
    """Replace owner.name by a function that calls around(original, *args, **kwargs)."""
    original = getattr(owner, name)

    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapper._vtp = original
    setattr(owner, name, wrapper)
