"""One lmms-eval process that works through cells: its command, its settings file, its progress, what it leaves behind.

Loading the host costs more than a small model's cells, so cells share a process; each is put into the run folder as
soon as the host has written it, so that a crash costs the cell that was running and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vtp_plugin.errors import PruningError, one_line
from vtp_plugin.hosts.lmms_eval import status
from vtp_plugin.hosts.lmms_eval.settings import yaml_scalar
from vtp_plugin.hosts.lmms_eval.status import Reader
from vtp_plugin.reporting.runs import CELL, LOG, RESULTS, SCHEMA, Cell, Spec

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LOG_FILE, STATUS_FILE = "lmms-eval.log", "status.jsonl"


@dataclass
class Listener:
    """Who is told what happens: a cell starts, has answered n of m questions, has ended."""

    started: Callable[[Spec], None]
    answered: Callable[[Spec, int, int], None]
    ended: Callable[[Cell], None]


@dataclass
class Host:
    """One process over some cells; `work` is a new folder of its own."""

    cells: Sequence[Spec]
    entry: Mapping[str, Any]  # what all cells say to the host: model, model_args, tasks, limit
    into: Path  # the run folder's cells
    work: Path
    launch: Sequence[str] = ()  # put in front of the command instead of the Python interpreter
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None
    started: list[Spec] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)  # what the host said, by cell
    ended: set[str] = field(default_factory=set)

    @property
    def command(self) -> list[str]:
        return [*(self.launch or [sys.executable]), "-m", "lmms_eval", "--config", str(self.work / "cells.yaml")]

    def run(self, listener: Listener, stopped: Callable[[], bool]) -> list[Spec]:
        """Work through the cells; those that the process did not come to. A stopped process decides nothing."""
        self.work.mkdir(parents=True)
        (self.work / "cells.yaml").write_text(yaml.safe_dump([self._entry(cell) for cell in self.cells]))
        code = self._watch(listener)
        if stopped():
            return []
        self._collect(listener)
        left = [cell for cell in self.cells if cell not in self.started]
        for cell in self.started if self.started else left:
            if cell.id not in self.ended:
                self._end(listener, cell, "failed", self.errors.get(cell.id) or self._reason(code))
        return left if self.started else []

    def stop(self) -> None:
        """End the process and those that it started."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)

    def _entry(self, cell: Spec) -> dict[str, Any]:
        said = {"pruning": cell.pruning, "output_path": str(self.work / cell.id), "log_samples": True}
        return {**self.entry, **said, **({"pruning_args": dict(cell.pruning_args)} if cell.pruning_args else {})}

    def _watch(self, listener: Listener) -> int:
        """Start the process, follow its output to a log file; its exit code."""
        said = Reader(self.work / STATUS_FILE)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self.environment, status.VARIABLE: str(said.path)}
        with (self.work / LOG_FILE).open("w") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
                start_new_session=True,  # an interrupt from the keyboard is for us: we end the process ourselves
            )
            for line in self.process.stdout:  # a progress bar's carriage return ends a line, too
                log.write(line)
                self._hear(said, listener)
            self._hear(said, listener)
        return self.process.wait()

    def _hear(self, said: Reader, listener: Listener) -> None:
        """What our plugin in the process has said since it was last asked."""
        for line in said.new():
            cell = next(cell for cell in self.cells if cell.id == Path(line["cell"]).name)
            if line["event"] == status.STARTED:
                self._begin(cell, listener)
            elif line["event"] == status.ANSWERED:
                listener.answered(cell, line["done"], line["of"])
            elif line["event"] == status.FAILED:
                self.errors.setdefault(cell.id, one_line(line["error"]))

    def _begin(self, cell: Spec, listener: Listener) -> None:
        """The host starts a cell (every process of a distributed run says so): the one before it is written."""
        if cell not in self.started:
            self._collect(listener)
            self.started.append(cell)
            listener.started(cell)

    def _collect(self, listener: Listener) -> None:
        """Put what the host has written whole into the run folder."""
        for cell in self.started:
            found = sorted((self.work / cell.id).rglob("*_results.json"))
            if cell.id not in self.ended and found:
                try:
                    collect(found[-1], self.work / cell.id / "gallery", Cell(**_plain(cell), folder=self._folder(cell)))
                except PruningError as error:
                    self.errors.setdefault(cell.id, str(error))
                else:
                    self._end(listener, cell, "done")

    def _folder(self, cell: Spec) -> Path:
        return self.into / cell.id

    def _end(self, listener: Listener, cell: Spec, status: str, error: str | None = None) -> None:
        self.ended.add(cell.id)
        alone = command_alone(self.entry, cell, self.launch)
        ended = Cell(**_plain(cell), folder=self._folder(cell), status=status, error=error, command=alone)
        write_cell(ended)
        listener.ended(ended)

    def _reason(self, code: int) -> str:
        """Why a cell has no results, in one sentence."""
        lines = [COLOUR.sub("", line).strip() for line in (self.work / LOG_FILE).read_text().splitlines()]
        said = next((line for line in reversed(lines) if line), "it said nothing")
        died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the lmms-eval process {died} without results; its last line: {said}"


def command_alone(
    entry: Mapping[str, Any], cell: Spec, launch: Sequence[str] = (), into: Path | None = None
) -> list[str]:
    """The command line that runs this cell by itself, from the folder that it writes below, or `into` it."""
    pairs = ",".join(f"{key}={yaml_scalar(value)}" for key, value in cell.pruning_args.items())
    said = {**entry, "pruning": cell.pruning, "pruning_args": pairs, "output_path": str((into or Path()) / cell.id)}
    options = [part for key, value in said.items() if value not in ("", None) for part in (f"--{key}", str(value))]
    return [*(launch or ["python"]), "-m", "lmms_eval", *options, "--log_samples"]


def collect(results: Path, gallery: Path, cell: Cell) -> None:
    """Copy what the host wrote for a cell into its folder. PruningError if it is not whole."""
    shutil.rmtree(cell.folder, ignore_errors=True)
    cell.folder.mkdir(parents=True)
    shutil.copy(results, cell.folder / RESULTS)
    stamp = results.name.removesuffix("_results.json")
    for log in results.parent.glob(f"{stamp}_samples_*.jsonl"):
        shutil.copy(log, cell.folder / LOG.format(log.name.removesuffix(".jsonl").removeprefix(f"{stamp}_samples_")))
    if gallery.is_dir():
        shutil.copytree(gallery, cell.folder / gallery.name)
    cell.check()
    _ = cell.accuracies  # reads every line


def write_cell(cell: Cell) -> None:
    """cell.json, whole or not at all."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    said = {"schema": SCHEMA, **_plain(cell), "status": cell.status, "error": cell.error, "command": list(cell.command)}
    draft = cell.folder / f".{CELL}"
    draft.write_text(json.dumps(said, indent=1) + "\n")
    draft.replace(cell.folder / CELL)


def _plain(cell: Spec) -> dict[str, Any]:
    """The fields of a configuration."""
    return {name: value for name, value in asdict(cell).items() if name in Spec.__dataclass_fields__}
