"""What a list of checks found, one after the other: of a strategy (`conformance`) or of a family (`promises`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vtp_plugin.errors import PruningError


class Broken(Exception):
    """A promise that is not kept; the message says how it was seen."""


@dataclass(frozen=True)
class Outcome:
    """One check and what it found."""

    name: str
    passed: bool
    remark: str


def outcomes(checks: Sequence[Callable[[Any], str]], of: Any, needed: Callable[[Any], str]) -> Iterator[Outcome]:
    """What every check finds, one after the other; nothing behind the one that is `needed` if that fails."""
    for check in checks:
        try:
            yield Outcome(check.__doc__, True, check(of) or "")
            continue
        except (Broken, PruningError) as broken:
            yield Outcome(check.__doc__, False, str(broken))
        except Exception as error:
            yield Outcome(check.__doc__, False, f"{type(error).__name__}: {error}")
        if check is needed:
            return
