"""A record that is written row by row, and goes on where it was: what is measured once is not lost."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtp_plugin import files
from vtp_plugin.errors import Interrupted, PruningError, sentence
from vtp_plugin.reporting.record import versions

SAME = ("device", "threads", "versions")  # besides the facts of a bench: what a row must share with its record
Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One row to measure: what tells it from others, how it is called, and how it is measured."""

    key: Mapping[str, Any]
    label: str
    measure: Callable[[], Row]


class Journal:
    """The rows of a bench, kept in a JSON file if there is one."""

    def __init__(self, path: Path | None, facts: Mapping[str, Any], device: torch.device, again: bool = False) -> None:
        """PruningError for a file that holds other settings, unless `again` says to begin anew.

        With the same settings `again` measures what is asked for anew, and keeps what is not.
        """
        self.path, self.again = path, again
        self.head = {"command": shlex.join(["vtp", *sys.argv[1:]]), **machine(device), **facts}
        self.rows: list[Row] = []
        self.older: list[Row] = []  # which give way to rows of the same key
        if path is not None and path.exists() and path.stat().st_size:
            try:
                self.rows = self._found(path, facts)
            except PruningError:
                if not again:
                    raise
        if again:
            self.rows, self.older = [], self.rows

    def _found(self, path: Path, facts: Mapping[str, Any]) -> list[Row]:
        read = files.read_json(path)
        for name in (*facts, *SAME):
            if read.get(name) != self.head[name]:
                raise PruningError(
                    f"{path} is a record of other settings ({name}: {read.get(name)!r}, now {self.head[name]!r}): "
                    "name another file, or say --again to begin anew"
                )
        return list(read["timings"])

    def row(self, key: Mapping[str, Any]) -> Row | None:
        """The row that was measured already."""
        return next((row for row in self.rows if _is(row, key)), None)

    def add(self, key: Mapping[str, Any], row: Row) -> None:
        """Keep a row, on disk before the next one begins."""
        self.older = [other for other in self.older if not _is(other, key)]
        self.rows.append({**key, **row})
        if self.path is not None:
            files.write_json(self.path, {**self.head, "timings": [*self.older, *self.rows]})

    def fill(self, items: Sequence[Item], until: float = float("inf"), *, forgiving: bool = False) -> list[Row]:
        """Measure what is missing, saying on stderr how far it is; the rows in the order of the items.

        `until`: on the monotonic clock; no row begins behind it. `forgiving`: a row that fails is told and left out.
        """
        missing = [item for item in items if self.row(item.key) is None]
        if len(missing) < len(items):
            say(f"{len(items) - len(missing)} of {len(items)} rows were measured already")
        began = time.monotonic()
        for number, item in enumerate(missing):
            if time.monotonic() > until:
                say(f"out of time: {len(missing) - number} rows are left out")
                break
            try:
                self._measure(item, number, len(missing), began)
            except (PruningError, RuntimeError) as error:
                if not forgiving or isinstance(error, Interrupted):
                    raise
                say(f"{item.label}: {sentence(error)}")
        return [row for item in items if (row := self.row(item.key)) is not None]

    def _kept(self) -> str:
        """What a stop leaves, for its sentence."""
        if self.path is None:
            return ""
        how = " without --again" if self.again else ""
        return f"; {self.path} keeps {len(self.older) + len(self.rows)} rows, the same command{how} goes on"

    def _measure(self, item: Item, number: int, of: int, began: float) -> None:
        try:
            row = item.measure()
        except KeyboardInterrupt:
            raise Interrupted(f"stopped at {item.label}{self._kept()}") from None
        self.add(item.key, row)
        spent = time.monotonic() - began
        left = spent / (number + 1) * (of - number - 1)
        say(f"{number + 1} of {of}, {item.label}: {duration(spent)}, about {duration(left)} left")


def _is(row: Row, key: Mapping[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in key.items())


def machine(device: torch.device) -> dict[str, Any]:
    """What a row was measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "versions": versions()}


def say(line: str) -> None:
    """On stderr, with and without a terminal."""
    print(f"vtp bench: {line}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time as people say it."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
