"""Python files of one's own as plugins: `--module my_file.py`, without a package around them."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from vtp_plugin.adapter import Adapter
from vtp_plugin.errors import PruningError
from vtp_plugin.hookspecs import hookimpl
from vtp_plugin.strategy import PruningStrategy


class Defined:
    """What a module defines, as a plugin."""

    def __init__(self, module: ModuleType) -> None:
        self.classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]

    @hookimpl
    def vtp_register_strategies(self, register: Callable[[type], None]) -> None:
        for cls in self.classes:
            if issubclass(cls, PruningStrategy) and isinstance(getattr(cls, "name", None), str):
                register(cls)

    @hookimpl
    def vtp_register_adapters(self, register: Callable[[type], None]) -> None:
        for cls in self.classes:
            if issubclass(cls, Adapter) and isinstance(getattr(cls, "family", None), str):
                register(cls)


@cache
def load(path: Path) -> ModuleType:
    """A Python file as a module of its own name. PruningError with file and line for one that cannot be imported."""
    if not path.is_file():
        raise PruningError(f"file not found: {path}")
    name = f"vtp_module_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise PruningError(f"not a Python file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        line = next((f":{at.lineno}" for at in reversed(_frames(error)) if at.filename == str(path)), "")
        raise PruningError(f"{path}{line} cannot be imported: {type(error).__name__}: {error}") from None
    return module


def _frames(error: BaseException) -> Sequence[traceback.FrameSummary]:
    return traceback.extract_tb(error.__traceback__)
