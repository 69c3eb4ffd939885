"""One plugin manager, and the two catalogues that its plugins fill.

A package that cannot join is named in one warning and left out: whoever does not ask for what it offers is not
disturbed by it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

from vtp_plugin import hookspecs, modules
from vtp_plugin.adapter import Adapter
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.strategy import PruningStrategy

GROUP = "vtp"
BUILT_IN = ("vtp_plugin.strategies", "vtp_plugin.adapters", "vtp_plugin.pruning")
MODULES = "VTP_MODULE"  # paths of Python files that join the catalogues, in this process and its children

left_out: dict[str, str] = {}  # plugins that could not join, and why
disputed: dict[str, str] = {}  # names of strategies that one of those wanted, too: what there is to say about it


@cache
def manager() -> pluggy.PluginManager:
    """The manager with the built-ins and every installed package of the entry point group `vtp` that can join."""
    pm = pluggy.PluginManager(GROUP)
    pm.add_hookspecs(hookspecs)
    for name in BUILT_IN:
        pm.register(import_module(name), name=name)
    left_out.clear()
    disputed.clear()
    for entry in entry_points(group=GROUP):
        if entry.value not in BUILT_IN:
            _join(pm, entry)
    for path in filter(None, os.environ.get(MODULES, "").split(os.pathsep)):
        _register(pm, Path(path))
    return pm


def _join(pm: pluggy.PluginManager, entry: EntryPoint) -> None:
    """Let a package join with all that it offers, or not at all."""
    name = entry.name if not pm.has_plugin(entry.name) else f"{entry.dist.name}.{entry.name}"
    plugin = None
    try:
        plugin = entry.load()
        pm.register(plugin, name=name)
        pm.check_pending()
        if not pm.get_hookcallers(plugin):
            raise PruningError(f"'{entry.value}' has no function that is marked with hookimpl")
        _check_offers(pm, plugin)
    except (Exception, SystemExit) as error:
        if plugin is not None and pm.is_registered(plugin):
            pm.unregister(plugin)
        _leave_out(f"{name} ({entry.value})", error)


def _leave_out(name: str, error: BaseException) -> None:
    said = str(error) if isinstance(error, PruningError) else f"{type(error).__name__}: {error}"
    left_out[name] = said
    warnings.warn(f"the vtp plugin {name} is left out: {said}", RuntimeWarning, stacklevel=4)


def _check_offers(pm: pluggy.PluginManager, plugin: Any) -> None:
    """PruningError for a class that is none of ours, or whose name is taken."""
    others = [other for other in pm.get_plugins() if other is not plugin]
    taken = _offered(pm, "vtp_register_strategies", [plugin])
    for cls in _offered(pm, "vtp_register_strategies", others):
        _check_class(cls, PruningStrategy, "name")
        if twin := next((other for other in taken if other.name == cls.name and other is not cls), None):
            disputed[cls.name] = f"two strategies are named '{cls.name}': {_path(twin)} and {_path(cls)}"
            raise PruningError(disputed[cls.name])
    families = {other.family: other for other in _offered(pm, "vtp_register_adapters", [plugin])}
    for cls in _offered(pm, "vtp_register_adapters", others):
        _check_class(cls, Adapter, "family")
        if families.get(cls.family, cls) is not cls:
            twin = families[cls.family]
            raise PruningError(f"two adapters are named '{cls.family}': {_path(twin)} and {_path(cls)}")


def _offered(pm: pluggy.PluginManager, hook: str, without: list[Any]) -> list[Any]:
    """What the plugins register, some of them aside."""
    found: list[Any] = []
    pm.subset_hook_caller(hook, remove_plugins=without)(register=found.append)
    return found


def _check_class(cls: Any, base: type, named: str) -> None:
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PruningError(f"{cls!r} is no {base.__name__} class")
    if not isinstance(getattr(cls, named, None), str):
        raise PruningError(f"{_path(cls)} has no {named}")


def each(hook: str, **arguments: Any) -> None:
    """Call a hook of every plugin by itself; one that raises is left out, the built-ins' errors pass."""
    pm = manager()
    for plugin in pm.get_plugins():
        others = [other for other in pm.get_plugins() if other is not plugin]
        try:
            pm.subset_hook_caller(hook, remove_plugins=others)(**arguments)
        except Exception as error:
            name = pm.get_name(plugin)
            if name.startswith("vtp_plugin"):
                raise
            pm.unregister(plugin)
            _leave_out(name, error)


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
        module = modules.load(path)
        hooked = any(pm.parse_hookimpl_opts(module, each) for each in dir(module))
        pm.register(module if hooked else modules.Defined(module), name=name)


@cache
def strategies() -> dict[str, type[PruningStrategy]]:
    """Every strategy by name."""
    found: dict[str, type[PruningStrategy]] = {}

    def register(cls: type[PruningStrategy]) -> None:
        _check_class(cls, PruningStrategy, "name")
        other = found.setdefault(cls.name, cls)
        if other is not cls:
            raise PruningError(f"two strategies are named '{cls.name}': {_path(other)} and {_path(cls)}")

    manager().hook.vtp_register_strategies(register=register)
    return dict(sorted(found.items()))


@cache
def adapters() -> tuple[type[Adapter], ...]:
    """Every adapter, in the order in which they are asked whether a model is theirs."""
    found: list[type[Adapter]] = []
    register: Callable[[type[Adapter]], None] = found.append
    manager().hook.vtp_register_adapters(register=register)
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
    """The strategy class of that name; PruningError with a suggestion if there is none, or two want the name."""
    if name not in strategies():
        missing = "".join(f" Left out: {plugin}: {why}" for plugin, why in left_out.items())
        raise PruningError(f"{unknown('strategy', name, strategies())}{missing}")
    if name in disputed:
        raise PruningError(disputed[name])
    return strategies()[name]


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
