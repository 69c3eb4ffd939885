"""What happens inside the host's process, told to whoever started it: one JSON object a line in a file.

The file's name comes with the environment of the process, `VTP_STATUS`; without it nothing is written. Every line has
`cell`, the output folder of the evaluation that is running, and `event`: started, answered (`done` of `of` questions)
or failed (`error`, one sentence).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "VTP_STATUS"
STARTED, ANSWERED, FAILED = "started", "answered", "failed"

cell: ContextVar[str] = ContextVar("cell", default="")  # the output folder of the evaluation that is running


def say(event: str, environment: Mapping[str, str] = os.environ, **facts: Any) -> None:
    """Append a line: short enough to stay whole between several processes."""
    if path := environment.get(VARIABLE):
        with open(path, "a") as file:
            file.write(json.dumps({"cell": cell.get(), "event": event, **facts}) + "\n")


@dataclass
class Reader:
    """The lines of a status file that have not been read yet."""

    path: Path
    read: int = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Whole lines only; one that is being written is left for the next time."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self.read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.read += len(whole)
        yield from map(json.loads, whole.splitlines())
