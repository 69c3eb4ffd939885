"""Arguments by name, as a signature reads them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def bound(original: Callable, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name; what the signature does not name beside them."""
    signature = inspect.signature(original)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    rest = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    return arguments | {k: v for name in rest for k, v in arguments.pop(name, {}).items()}
