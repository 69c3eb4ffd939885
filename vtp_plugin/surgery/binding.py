"""Arguments by name, as a signature reads them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from vtp_plugin.surgery import cache

_known: WeakKeyDictionary[FunctionType, inspect.Signature] = WeakKeyDictionary()  # of methods: reading takes a while


def signature_of(function: Callable) -> inspect.Signature:
    """The signature of a function or of a method, without what it is bound to."""
    own = getattr(function, "__func__", None)
    if not isinstance(own, FunctionType):  # nothing else need be hashable, or unlike what it equals
        return inspect.signature(function)
    if own not in _known:
        _known[own] = inspect.signature(function)
    return _known[own]


def bound(original: Callable, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name; what the signature does not name beside them."""
    signature = signature_of(original)
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
