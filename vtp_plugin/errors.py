"""The errors of the package: each says what was asked, what was found and what exists."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PruningError(ValueError):
    """Anything that a user can put right; its message is one sentence meant for the user."""


class HostChanged(PruningError):
    """A host is not what this release was written for; its message says which part."""


class NothingPruned(PruningError):
    """Images went in and no token was cut, although the configuration asked for it."""


def unknown(kind: str, name: str, known: Iterable[str], *, of: str = "", listed: str = "Available") -> PruningError:
    """An error for a name that is not in `known`, with the closest one suggested."""
    options = sorted(known)
    close = get_close_matches(name, options, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return PruningError(f"unknown {kind} '{name}'{of}.{hint} {listed}: {', '.join(options)}")
