"""The catalogue: one file per method. A new file here is found by itself; nothing else needs an edit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

from vtp_plugin.hookspecs import hookimpl
from vtp_plugin.strategy import PruningStrategy


@hookimpl
def vtp_register_strategies(register: Callable[[type[PruningStrategy]], None]) -> None:
    for info in iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, PruningStrategy) and cls.__module__ == module.__name__:
                register(cls)
