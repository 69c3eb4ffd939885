"""A run folder as it is read: the settings of a comparison, its cells, and every answer of every task.

Layout, written by `vtp_plugin.compare.sweep` (docs/comparing.md):

    sweep.yaml                        the settings
    cells/ID/cell.json                what the cell is and how it ended; written last, so "done" means complete
    cells/ID/results.json             the host's results file, with the record under "pruning"
    cells/ID/samples_TASK.jsonl       the host's sample log, one line per question
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vtp_plugin import files
from vtp_plugin.errors import Failed, PruningError, unknown
from vtp_plugin.reporting import schema

SCHEMA = 1
BASELINE = "none"
SETTINGS, CELLS, CELL, RESULTS = "sweep.yaml", "cells", "cell.json", "results.json"
LOG = "samples_{}.jsonl"
LARGEST = 1e300  # of a value that can be computed with; nan is none


@dataclass(frozen=True)
class Answer:
    """One question of one cell."""

    correct: float  # the task's own value for this answer, see `value`
    answer: str
    target: str
    question: str
    report: Mapping[str, Any]  # the sample's part of the record: images, prompt_tokens, prefill_flops, seconds


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One configuration that is asked for."""

    id: str  # readable and unique in a run folder: none, vprune, atp-0.25, random-0.25-seed3
    label: str
    pruning: str  # as after --pruning; "none" for the unpruned model
    pruning_args: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    keep: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cell(Spec):
    """One configuration and how it ended, as cell.json says; results and answers are read when they are asked for."""

    folder: Path
    status: str = "done"  # or "failed"
    error: str | None = None
    command: Sequence[str] = ()

    def check(self) -> Cell:
        """The cell itself, if its results are whole. PruningError if not."""
        missing = {"results", "configs", "n-samples", "pruning"} - set(self.results)
        if not isinstance(self.results.get("configs", {}), dict):
            raise PruningError(f"{self.folder / RESULTS}: configs must be a mapping of tasks")
        logs = {task: self.folder / LOG.format(task) for task in self.results.get("configs", {})}
        missing |= {log.name for log in logs.values() if not log.is_file()}
        if missing:
            raise PruningError(f"{self.folder}: half-written, no {', '.join(sorted(missing))}")
        schema.checked(schema.Results, self.results, str(self.folder / RESULTS))
        return self

    @cached_property
    def results(self) -> dict[str, Any]:
        """The host's results file."""
        return read_json(self.folder / RESULTS)

    @property
    def record(self) -> dict[str, Any]:
        """The run's `pruning` entry (docs/record.md)."""
        return self.results["pruning"]

    @property
    def tasks(self) -> list[str]:
        """The tasks that were asked, without groups, in the alphabet's order."""
        return sorted(self.results["configs"])

    @property
    def model(self) -> tuple[str, str]:
        """The host's model id and the checkpoint."""
        return self.results["config"]["model"], self.results["model_name"]

    @cached_property
    def accuracies(self) -> dict[str, float]:
        """The mean of every task's value, in [0, 1] for nearly all tasks; tasks without such a value are left out."""
        asked = {task: given for task, given in self._answers.items() if given is not None}
        return {task: sum(a.correct for a in given.values()) / len(given) for task, given in asked.items()}

    @property
    def unscored(self) -> list[str]:
        """Tasks whose sample log has no value per question (they are judged as a whole)."""
        return [task for task, given in self._answers.items() if given is None]

    def answers(self, task: str) -> dict[int, Answer]:
        """Every question of a task: document number -> answer. PruningError for a task without values."""
        if task not in self.tasks:
            raise unknown("task", task, self.tasks, of=f" in {self.folder}")
        if self._answers[task] is None:
            raise PruningError(f"{self.folder}: the sample log of {task} has no value per question")
        return self._answers[task]

    @cached_property
    def _answers(self) -> dict[str, dict[int, Answer] | None]:
        return {task: self._read(task) for task in self.tasks}

    def _read(self, task: str) -> dict[int, Answer] | None:
        """The answers to a task; None if one of them has no value."""
        metrics = self.results["configs"][task].get("metric_list") or []
        answers = {}
        for line in self._lines(task):
            if (correct := value(line, metrics)) is None:
                return None
            answers[line["doc_id"]] = _answer(line, correct)
        return answers

    def _lines(self, task: str) -> list[dict[str, Any]]:
        """A task's log in the order of its documents; of several filters the first, which comes first in the log."""
        first: dict[int, dict[str, Any]] = {}
        path = self.folder / LOG.format(task)
        for number, line in enumerate(files.read_json_lines(path, "not there, the cell is half-written"), 1):
            first.setdefault(schema.checked(schema.Line, line, f"{path}, line {number}").doc_id, line)
        expected = self.results["n-samples"].get(task, {}).get("effective", 0)
        if len(first) != expected or not first:
            raise PruningError(f"{self.folder}: half-written, {len(first)} of {expected} questions of {task}")
        return [first[number] for number in sorted(first)]


def _answer(line: Mapping[str, Any], correct: float) -> Answer:
    said = line["filtered_resps"]
    return Answer(
        correct=correct,
        answer=said if isinstance(said, str) else json.dumps(said, ensure_ascii=False),
        target=str(line["target"]),
        question=str(line.get("input", "")),
        report=line.get("pruning", {}),
    )


def value(line: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """What a task says of one answer: the first of its metrics that is a number in this line, higher is better.

    `metrics` is the task's `metric_list`, whose first entry is what the task is about: exact_match (GQA, AI2D, VQA),
    pope_accuracy, mme_perception_score or mme_cognition_score. A mapping counts by its numeric `score`. None: no
    metric of this line is a number, as in tasks that only a judge of all answers scores (MMBench).
    """
    for metric in metrics:
        found = line.get(metric["metric"])
        found = found.get("score") if isinstance(found, Mapping) else found
        if isinstance(found, (bool, int, float)) and abs(found) < LARGEST and metric.get("higher_is_better", True):
            return float(found)
    return None


@dataclass(frozen=True)
class Run:
    """A run folder: settings, and the cells that have ended, in the order of the settings."""

    folder: Path
    settings: Mapping[str, Any]
    cells: Sequence[Cell]

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.done)

    def __getitem__(self, id: str) -> Cell:
        found = {cell.id: cell for cell in self.cells}
        if id not in found:
            raise unknown("cell", id, found, of=f" in {self.folder}")
        return found[id]

    @property
    def done(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.status == "done"]

    @property
    def failed(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.status == "failed"]

    def failed_of(self, asked: Sequence[Spec]) -> list[Cell]:
        """Those of these configurations that failed."""
        ids = {spec.id for spec in asked}
        return [cell for cell in self.failed if cell.id in ids]

    @property
    def unfinished(self) -> list[str]:
        """Cells of the settings that have not ended yet."""
        ended = {cell.id for cell in self.cells}
        return [entry["id"] for entry in self.settings["cells"] if entry["id"] not in ended]

    @property
    def baseline(self) -> Cell:
        """The unpruned model. PruningError, with its reason and what to do, if it has no results."""
        found = [cell for cell in self.done if cell.pruning == BASELINE]
        if found:
            return found[0]
        missing = f"{self.folder}: a comparison needs the unpruned run ({BASELINE})"
        broken = [cell for cell in self.failed if cell.pruning == BASELINE] or self.failed
        if broken:
            why = str(broken[0].error).rstrip(".")
            raise Failed(
                f"{self.folder}: the cell '{broken[0].id}' failed: {why}. Mend that and run the same "
                "command again, which goes on from here; `vtp doctor` says whether the installation is sound"
            )
        raise PruningError(missing)

    @property
    def tasks(self) -> list[str]:
        """The tasks that have a value per question."""
        return list(self.baseline.accuracies)


def load(folder: str | Path) -> Run:
    """Read a run folder. PruningError if it is empty, half-written, or mixes models or tasks."""
    folder = Path(folder)
    if not (folder / SETTINGS).is_file():
        raise PruningError(f"{folder}: not a run folder (no {SETTINGS}); `vtp compare -o {folder}` makes one")
    settings = read_settings(folder / SETTINGS)
    for path in [folder / CELLS, *(folder / CELLS / entry["id"] for entry in settings["cells"])]:
        if path.is_symlink():
            raise PruningError(f"{path}: a link; a run folder is read from inside only")
    ids = dict.fromkeys(entry["id"] for entry in settings["cells"])
    cells = [_cell(folder / CELLS / id) for id in ids if (folder / CELLS / id / CELL).exists()]
    run = Run(folder, settings, cells)
    if not cells:
        raise PruningError(f"{folder}: an empty run folder, no cell has ended; `vtp compare -o {folder}` goes on")
    _check_same(run.done)
    return run


def measured(folder: Path) -> bool:
    """Whether a folder holds the results of a cell."""
    return any(read_json(path).get("status") == "done" for path in (folder / CELLS).glob(f"*/{CELL}"))


def read_settings(path: Path) -> dict[str, Any]:
    """sweep.yaml of a run folder."""
    settings = files.read_yaml(path)
    if not isinstance(settings, dict) or not isinstance(settings.get("cells"), list):
        raise PruningError(f"{path}: no settings of a comparison (expected a list of 'cells')")
    schema.checked(schema.Settings, settings, str(path))
    return settings


def _cell(folder: Path) -> Cell:
    said = read_json(folder / CELL)
    if said.pop("schema", None) != SCHEMA:
        raise PruningError(f"{folder / CELL}: not written by this version (expected schema {SCHEMA})")
    cell = Cell(folder=folder, **schema.checked(schema.CellFile, said, str(folder / CELL)).model_dump())
    if cell.id != folder.name:
        raise PruningError(f"{folder / CELL}: it is of another cell, '{cell.id}'")
    return cell.check() if cell.status == "done" else cell


def _check_same(cells: Sequence[Cell]) -> None:
    """All cells answered the same questions with the same model."""
    for cell in cells[1:]:
        if cell.model != cells[0].model:
            said = " and ".join(f"{model} ({c.id}, {name})" for c in (cells[0], cell) for model, name in [c.model])
            raise PruningError(f"results of different models in one comparison: {said}")
        asked = [{task: c.results["n-samples"].get(task) for task in c.tasks} for c in (cells[0], cell)]
        if asked[0] != asked[1]:
            raise PruningError(
                f"results of different tasks in one comparison: {cells[0].id} {asked[0]}, {cell.id} {asked[1]}"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A file of a cell."""
    return files.read_json(path, "not there, the cell is half-written")
