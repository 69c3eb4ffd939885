"""One plugin manager, and the two catalogues that its plugins fill."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pluggy

from vtp_plugin import hookspecs
from vtp_plugin.adapter import Adapter
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.hookspecs import hookimpl
from vtp_plugin.strategy import PruningStrategy

BUILT_IN = ("vtp_plugin.strategies", "vtp_plugin.adapters", "vtp_plugin.pruning")
MODULES = "VTP_MODULE"  # paths of Python files that join the catalogues, in this process and its children


@cache
def manager() -> pluggy.PluginManager:
    """The manager with the built-ins and every installed package of the entry point group `vtp`."""
    pm = pluggy.PluginManager("vtp")
    pm.add_hookspecs(hookspecs)
    for name in BUILT_IN:
        pm.register(import_module(name), name=name)
    pm.load_setuptools_entrypoints("vtp")
    for path in filter(None, os.environ.get(MODULES, "").split(os.pathsep)):
        _register(pm, Path(path))
    pm.check_pending()
    return pm


def join(paths: Iterable[str | Path]) -> None:
    """Let Python files of one's own into the catalogues of this process and of those that it starts (VTP_MODULE)."""
    known = [path for path in os.environ.get(MODULES, "").split(os.pathsep) if path]
    for path in map(Path, paths):
        _register(manager(), path)
        known += [said] if (said := str(path.resolve())) not in known else []
        os.environ[MODULES] = os.pathsep.join(known)
        strategies.cache_clear()
        adapters.cache_clear()


def _register(pm: pluggy.PluginManager, path: Path) -> None:
    """A file's own hook implementations, or else all strategies and families that it defines."""
    name = str(path.resolve())
    if not pm.has_plugin(name):
        module = load(path)
        hooked = any(pm.parse_hookimpl_opts(module, each) for each in dir(module))
        pm.register(module if hooked else _Defined(module), name=name)


class _Defined:
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


@cache
def strategies() -> dict[str, type[PruningStrategy]]:
    """Every strategy by name."""
    found: dict[str, type[PruningStrategy]] = {}

    def register(cls: type[PruningStrategy]) -> None:
        other = found.setdefault(cls.name, cls)
        if other is not cls:
            raise PruningError(f"two strategies are named '{cls.name}': {_path(other)} and {_path(cls)}")

    manager().hook.vtp_register_strategies(register=register)
    return dict(sorted(found.items()))


@cache
def adapters() -> tuple[type[Adapter], ...]:
    """Every adapter, in the order in which they are asked whether a model is theirs."""
    found: list[type[Adapter]] = []
    manager().hook.vtp_register_adapters(register=found.append)
    families = [cls.family for cls in found]
    for cls in found:
        if families.count(cls.family) > 1:
            clash = " and ".join(_path(c) for c in found if c.family == cls.family)
            raise PruningError(f"two adapters are named '{cls.family}': {clash}")
    return tuple(found)


def list_strategies() -> list[str]:
    """The names of all strategies."""
    return list(strategies())


def get_strategy(name: str) -> type[PruningStrategy]:
    """The strategy class of that name; PruningError with a suggestion if there is none."""
    if name not in strategies():
        raise unknown("strategy", name, strategies())
    return strategies()[name]


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
