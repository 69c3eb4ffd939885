"""What this package relies on inside its hosts, as data: one touch point per class, function or attribute.

A host moves without asking. So each touch point says where it is, what it must take or have, and what for; all of a
host are checked when the plugin attaches to it, and the user reads which one moved instead of an error far away.
"""

from __future__ import annotations

import inspect
import sys
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
        return _version(self.package)

    def __str__(self) -> str:
        return self.oldest if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


@dataclass(frozen=True)
class TouchPoint:
    """One place in a host.

    `where`: `module:Class.attribute`, or `.path` from the object that is attached to. In a path a number is an index,
    `name()` is called, and `@name` is a name in the module that defines the class of what stands before.
    """

    window: Window
    where: str
    why: str
    takes: tuple[str, ...] = ()  # parameters that are passed or read by name
    has: tuple[str, ...] = ()  # attributes
    says: tuple[str, ...] = ()  # texts in a function's code: names of files and fields
    since: tuple[int, ...] = ()  # the release that brought it, where older ones that were tested do without

    def missing(self, root: Any = None) -> str:
        """What is not as it was, as a part of a sentence; "" if all is, or if the release is older than it."""
        if self.since and release(self.window.package) < self.since:
            return ""
        name = self.where.lstrip(".") or f"{type(root).__name__}.forward"
        try:
            found = located(self.where, root)
        except (ImportError, AttributeError, IndexError, KeyError, TypeError) as error:
            return f"no longer has {name} ({error})"
        if lacking := [one for one in self.has if not any(hasattr(found, n) for n in one.split(EITHER))]:
            return f"no longer has {_quoted(lacking)} in {name}"
        if lacking := [one for one in self.takes if not parameters(found) & {*one.split(EITHER)}]:
            return f"no longer passes {_quoted(lacking)} to {name}"
        if lacking := [text for text in self.says if not any(text in said for said in texts(found))]:
            return f"no longer says {_quoted(lacking)} in {name}"
        return ""


def located(where: str, root: Any = None) -> Any:
    """What a touch point names."""
    module, _, path = where.partition(":")
    found = root if where.startswith(".") else import_module(module)
    for part in filter(None, (where if where.startswith(".") else path).replace("@", ".@").split(".")):
        found = _step(found, part)
    return found


def _step(found: Any, part: str) -> Any:
    if part.isdigit():
        return found[int(part)]
    if part.startswith("@"):
        return getattr(sys.modules[type(_inside(found)).__module__], part[1:])
    value = getattr(found, part.removesuffix("()"))
    return value() if part.endswith("()") else value


def parameters(function: Any) -> frozenset[str]:
    """The names that a function, a class or a module's forward takes."""
    function = _inside(function)
    if not inspect.isroutine(function) and hasattr(type(function), "forward"):
        function = type(function).forward
    return _parameters(getattr(function, "__func__", function))


def _inside(found: Any) -> Any:
    """What torch.compile has wrapped."""
    return getattr(found, "_orig_mod", found)


@cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def texts(function: Any) -> Iterator[str]:
    """The strings in a function's own code."""
    code = inspect.unwrap(getattr(function, "__func__", function)).__code__
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
    yield from code.co_names


def broken(points: Iterable[TouchPoint], root: Any = None) -> Iterator[str]:
    """A sentence for every touch point that is not as it was."""
    for point in points:
        if missing := point.missing(root):
            yield sentence(point, missing)


def sentence(point: TouchPoint, missing: str) -> str:
    """Which host moved, where, what for it was needed, and which releases are known to work."""
    window = point.window
    return (
        f"{window.package} {window.installed or '(not installed)'} {missing}, needed for {point.why}; "
        f"vtp-plugin {__version__} was tested with {window}"
    )


def check(points: Iterable[TouchPoint], root: Any = None) -> None:
    """HostChanged, one sentence, if a touch point is not as it was. Takes a few milliseconds."""
    for said in broken(points, root):
        raise HostChanged(said)


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def release(package: str) -> tuple[int, ...]:
    """5.24.0.dev1 -> (5, 24, 0)."""
    parts = (_version(package) or "0").split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(" or ".join(f"`{one}`" for one in name.split(EITHER)) for name in names)
