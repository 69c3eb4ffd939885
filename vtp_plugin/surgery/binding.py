"""Arguments by name, as a signature reads them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from vtp_plugin.surgery import cache


def bound(original: Callable, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name; what the signature does not name beside them."""
    signature = inspect.signature(original)
    kwargs = _renamed(signature, kwargs)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    rest = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    return arguments | {k: v for name in rest for k, v in arguments.pop(name, {}).items()}


def _renamed(signature: inspect.Signature, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The cache under the name that the signature has for it, where it takes nothing else."""
    given, known = cache.name_in(kwargs), cache.name_in(signature.parameters)
    wild = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if wild or given is None or known is None or given in signature.parameters:
        return kwargs
    return {(known if name == given else name): value for name, value in kwargs.items()}
