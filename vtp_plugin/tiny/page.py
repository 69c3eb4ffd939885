"""What docs/embedded-model.md says of a training run, from the log.json that the run left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vtp_plugin import files
from vtp_plugin.reporting.tables import Table

from .questions import TASKS
from .workshop import TRAINS


def stages(log: Path, trains: Mapping[str, Sequence[str]] = TRAINS) -> Table:
    """Steps, batch, rate and seconds of every stage that ran, of those that train these networks."""
    ran = files.read_json(log)
    table = Table(["stage", "trains", "steps", "pictures a step", "peak rate", "seconds"])
    for stage, trained in trains.items():
        if plan := ran.get(stage):
            numbers = (plan[name] for name in ("steps", "batch", "rate", "seconds"))
            table.add(stage, ", ".join(trained), *(f"{number:g}" for number in numbers))
    return table


def accuracy(log: Path) -> Table:
    """Percent of the questions that are answered right, by task."""
    table = Table(["accuracy, %", *TASKS, "all"])
    for name, row in files.read_json(log)["accuracy"].items():
        table.add(name, *(f"{100 * row[task]:.1f}" if task in row else "" for task in (*TASKS, "all")))
    return table
