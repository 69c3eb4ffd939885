"""The model families: one file each. A new file here is found by itself; nothing else needs an edit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

from vtp_plugin.adapter import Adapter
from vtp_plugin.hookspecs import hookimpl


@hookimpl
def vtp_register_adapters(register: Callable[[type[Adapter]], None]) -> None:
    for info in iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        for cls in vars(module).values():
            own = inspect.isclass(cls) and issubclass(cls, Adapter) and cls.__module__ == module.__name__
            if own and "family" in vars(cls):  # a base class has none
                register(cls)
