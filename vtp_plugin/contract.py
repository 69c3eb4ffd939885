"""What this package relies on inside its hosts, as data: one touch point per class, function or attribute.

A host moves without asking. So each touch point says where it is, what it must take or have, and what for; all of a
host are checked when the plugin attaches to it, and the user reads which one moved instead of an error far away.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vtp_plugin.errors import HostChanged
from vtp_plugin.version import __version__

EITHER = "|"  # between two names of which one must be there: the host has renamed it


@dataclass(frozen=True)
class Window:
    """The releases of a package that were tested, the oldest and the newest; everything between counts."""

    package: str
    oldest: str
    newest: str

    @property
    def installed(self) -> str | None:
        """The release that is here, or None."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def __str__(self) -> str:
        return self.oldest if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


@dataclass(frozen=True)
class TouchPoint:
    """One place in a host. `where`: `module:Class.attribute`, or `.path` from the object that is attached to."""

    window: Window
    where: str
    why: str
    takes: tuple[str, ...] = ()  # parameters that are passed or read by name
    has: tuple[str, ...] = ()  # attributes
    since: str = ""  # the release that brought it, where a tested one lacks it and does without

    def missing(self, root: Any = None) -> str:
        """What is not as it was, as a part of a sentence; "" if all is."""
        try:
            found = located(self.where, root)
        except (ImportError, AttributeError, IndexError, KeyError) as error:
            return f"no longer has {self.where.lstrip('.')} ({error})"
        if lacking := [name for name in self.has if not any(hasattr(found, n) for n in name.split(EITHER))]:
            return f"no longer has {', '.join(lacking)} in {named(found, self.where)}"
        known = parameters(found) if self.takes else ()
        if lacking := [name for name in self.takes if not any(n in known for n in name.split(EITHER))]:
            return f"no longer passes {', '.join(map(_quoted, lacking))} to {named(found, self.where)}"
        return ""


def located(where: str, root: Any = None) -> Any:
    """What a touch point names. A number in a path is an index."""
    module, _, path = where.partition(":")
    found = root if where.startswith(".") else import_module(module)
    for part in filter(None, (where if where.startswith(".") else path).split(".")):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


def parameters(function: Any) -> frozenset[str]:
    """The names that a function, a class or a module's forward takes."""
    function = type(function).forward if hasattr(type(function), "forward") else function
    function = getattr(function, "__func__", function)
    return _parameters(function)


@cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def named(found: Any, where: str) -> str:
    """What a touch point found, as a user may look for it."""
    return type(found).__name__ if where.startswith(".") and not callable(getattr(found, "__get__", None)) else where


def broken(points: Iterable[TouchPoint], root: Any = None) -> Iterator[str]:
    """A sentence for every touch point that is not as it was."""
    for point in points:
        if missing := point.missing(root):
            yield sentence(point, missing)


def sentence(point: TouchPoint, missing: str) -> str:
    """Which host moved, where, what for it was needed, and which releases are known to work."""
    window = point.window
    return (
        f"{window.package} {window.installed or '(not installed)'} {missing}, needed for {point.why}; vtp-plugin "
        f"{__version__} was tested with {window}"
    )


def check(points: Iterable[TouchPoint], root: Any = None) -> None:
    """HostChanged, one sentence, if a touch point is not as it was. Takes a few milliseconds."""
    for said in broken(points, root):
        raise HostChanged(said)


def _quoted(name: str) -> str:
    return " or ".join(f"`{one}`" for one in name.split(EITHER))
