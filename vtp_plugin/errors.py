"""The errors of the package: each says what was asked, what was found and what exists."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 1000  # letters of a message; of a longer one the middle is left out
NOWHERE = "it may be a fault of vtp-plugin; VTP_TRACEBACK=1 shows where it happened"


class PruningError(ValueError):
    """Anything that a user can put right; its message is one sentence meant for the user."""


class HostChanged(PruningError):
    """A host is not what this release was written for; its message says which part."""


class NothingPruned(PruningError):
    """Images went in and no token was cut, although the configuration asked for it."""


class Failed(PruningError):
    """Work that had begun and failed, a cell or a server; its message says why."""


class Interrupted(PruningError):
    """Stopped from the keyboard; its message says what is kept and how to go on."""


def unknown(kind: str, name: str, known: Iterable[str], *, of: str = "", listed: str = "Available") -> PruningError:
    """An error for a name that is not in `known`, with the closest one suggested."""
    options = sorted(known)
    close = get_close_matches(name[:LONGEST], options, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return PruningError(f"unknown {kind} '{name}'{of}.{hint} {listed}: {', '.join(options)}")


def sentence(error: BaseException) -> str:
    """What a boundary (the program, a host's run) says about an error of any kind: one line, no control letters."""
    return one_line(_said(error))


def reason(error: BaseException) -> str:
    """What a run of a host failed of: the error, or what each of several tries failed of."""
    while type(error).__name__ == "RetryError" and error.__cause__ is not None:
        error = error.__cause__
    return str(error) if isinstance(error, PruningError) else f"{type(error).__name__}: {error}"


def _said(error: BaseException) -> str:
    if isinstance(error, PruningError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"the package '{error.name}' is not installed, and this needs it"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; a smaller model, batch or picture needs less"
    return f"{type(error).__name__}: {str(error) or 'without a message'} ({NOWHERE})"


def one_line(text: str) -> str:
    """Text as one line that a terminal shows as it is: control letters written out, the middle of a long one cut."""
    flat = " ".join(text.split())
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in flat)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST * 2 // 3]} ... {shown[-LONGEST // 3 :]}"
