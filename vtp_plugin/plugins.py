"""One plugin manager, and the two catalogues that its plugins fill."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import pluggy

from vtp_plugin import hookspecs
from vtp_plugin.adapter import Adapter
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.strategy import PruningStrategy

BUILT_IN = ("vtp_plugin.strategies", "vtp_plugin.adapters", "vtp_plugin.pruning")


@cache
def manager() -> pluggy.PluginManager:
    """The manager with the built-ins and every installed package of the entry point group `vtp`."""
    pm = pluggy.PluginManager("vtp")
    pm.add_hookspecs(hookspecs)
    for name in BUILT_IN:
        pm.register(import_module(name), name=name)
    pm.load_setuptools_entrypoints("vtp")
    pm.check_pending()
    return pm


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
