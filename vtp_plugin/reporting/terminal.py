"""What people read on a terminal: text is printed as it is, whatever brackets, colons and letters are in it."""

from __future__ import annotations

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console that takes nothing for mark-up; lines are as long as they are, tables as wide as the terminal."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)
