"""Rows of papers' tables, run again through lmms-eval and held against what is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtp_plugin import files
from vtp_plugin.compare import matrix
from vtp_plugin.compare.published import Published, Row, Task
from vtp_plugin.errors import unknown
from vtp_plugin.hosts.lmms_eval.process import command_alone
from vtp_plugin.reporting import statistics
from vtp_plugin.reporting.runs import Cell, Run, Spec
from vtp_plugin.reporting.tables import Table

ROUNDED = 0.05  # a printed number stands for this much more and less, on its own scale
F1 = "pope_f1_score"  # of yes and no, over all questions
COLUMNS = ("task", "method", "tokens", "source", "paper", "ours", "interval", "difference", "verdict")
Metric = Callable[[NDArray], float]  # of the questions with these numbers


@dataclass(frozen=True)
class Estimate:
    """A metric of one cell: its value, and its interval where it is made of single questions."""

    value: float
    low: float | None = None
    high: float | None = None


def cells(tables: Published, rows: Sequence[Row]) -> list[Spec]:
    """The unpruned model and a cell for every setting of the rows; rows of several sources share them."""
    made = [matrix.UNPRUNED]
    for row in rows:
        if (setting := tables.setting(row)) is not None:
            fields = dict(setting.pruning_args)
            made.append(matrix.cell(setting.pruning, fields.pop("keep_ratio", None), id=_id(row), **fields))
    return matrix.unique(made)


def _id(row: Row) -> str:
    return f"{row.method}-{row.budget}".replace("%", "pct")


def tasks(tables: Published, rows: Sequence[Row], asked: Sequence[str]) -> list[str]:
    """The tasks of the tables that are asked for, or all that the rows have."""
    return [task for task in tables.tasks if (not asked or task in asked) and any(task in row.numbers for row in rows)]


def hosted(tables: Published, names: Sequence[str]) -> list[str]:
    """The host's names of tasks, each once."""
    return list(dict.fromkeys(tables.tasks[name].task for name in names))


def commands(specs: Sequence[Spec], host: dict[str, Any], folder: Path, launch: str = "") -> list[list[str]]:
    """What is run, one command line per cell; the host answers all questions if it is told no limit."""
    said = {**host, "tasks": ",".join(host["tasks"]), "limit": host["limit"] if host["limit"] > 0 else None}
    entry = {key: said[key] for key in ("model", "model_args", "limit", "tasks")} | dict(host.get("options") or {})
    return [command_alone(entry, cell, launch.split(), folder) for cell in specs]


def table(tables: Published, rows: Sequence[Row], names: Sequence[str], run: Run) -> Table:
    """Paper, ours, difference, interval, verdict; the unpruned model of every source first."""
    made = Table(COLUMNS, title=f"{tables.title}: papers and {run.baseline.model[1]}")
    for task in names:
        printed = [row for row in rows if task in row.numbers]
        for source in dict.fromkeys(row.source for row in printed):
            _add(made, tables, task, source, ("unpruned", str(tables.tokens or "all")), run.baseline, run)
        for row in printed:
            _add(made, tables, task, row.source, (row.method, row.budget), _cell(tables, row, run), run, row)
    made.caption = " ".join([*CAPTION, *_sources(tables, rows), *_notes(tables, names)])
    return made


CAPTION = (
    "Paper and ours on the paper's scale; interval: 95 % bootstrap over our questions.",
    "Reproduced: the printed number lies in the interval. The change is: the level differs, but what pruning loses "
    "against the unpruned model does not differ from what the paper's table says.",
)


def _sources(tables: Published, rows: Sequence[Row]) -> list[str]:
    named = dict.fromkeys(row.source for row in rows)
    return [f"{name}: {tables.sources[name].title}; {tables.sources[name].table}." for name in named]


def _notes(tables: Published, names: Sequence[str]) -> list[str]:
    return [f"{name}: {tables.tasks[name].note}." for name in names if tables.tasks[name].note]


def _cell(tables: Published, row: Row, run: Run) -> Cell | str:
    """The row's cell, or why there is none."""
    if tables.setting(row) is None:
        return tables.why_not(row)
    found = next((cell for cell in run.cells if cell.id == _id(row)), None)
    if found is None:
        return "not run"
    return found if found.status == "done" else f"failed: {found.error}"


def _add(
    made: Table,
    tables: Published,
    task: str,
    source: str,
    named: tuple[str, str],
    cell: Cell | str,
    run: Run,
    row: Row | None = None,
) -> None:
    whole = float(tables.sources[source].unpruned[task])
    paper = whole if row is None else float(row.numbers[task])
    head = (task, *named, source, f"{paper:g}")
    if isinstance(cell, str):
        made.add(*head, "-", "-", "-", cell)
        return
    ours, change = measured(cell, run.baseline, tables.tasks[task])
    interval = "-" if ours.low is None else f"[{ours.low:.1f}, {ours.high:.1f}]"
    said = verdict(paper, ours, None if row is None else paper - whole, change)
    made.add(*head, f"{ours.value:.1f}", interval, f"{ours.value - paper:+.1f}", said)


def verdict(paper: float, ours: Estimate, printed: float | None, change: Estimate) -> str:
    """What our number says of the printed one; `printed`: the paper's change from its unpruned model, None for that."""
    if ours.low is None or ours.high is None:
        return "no interval"
    if ours.low - ROUNDED <= paper <= ours.high + ROUNDED:
        return "reproduced"
    side = "above the paper" if ours.value > paper else "below the paper"
    if printed is None or change.low is None or change.high is None:
        return side
    same = change.low - 2 * ROUNDED <= printed <= change.high + 2 * ROUNDED
    return f"{side}; the change is reproduced" if same else side


# -- our numbers ------------------------------------------------------------------------------------------------------


def measured(cell: Cell, unpruned: Cell, task: Task) -> tuple[Estimate, Estimate]:
    """A cell's metric on the paper's scale, and its change from the unpruned model, question by question."""
    value = task.scale * reported(cell, task)
    metrics = [_metric(each, task, reported(each, task)) for each in (cell, unpruned)]
    if any(metric is None for metric in metrics):
        return Estimate(value), Estimate(value - task.scale * reported(unpruned, task))
    now, before = metrics
    n, draw = len(cell.answers(task.task)), np.random.default_rng(0)
    drawn = [draw.integers(0, n, n) for _ in range(statistics.RESAMPLES)]
    ours = task.scale * np.array([now(each) for each in drawn])
    change = ours - task.scale * np.array([before(each) for each in drawn])
    return _estimate(value, ours), _estimate(value - task.scale * reported(unpruned, task), change)


def _estimate(value: float, drawn: NDArray) -> Estimate:
    tail = 100 * (1 - statistics.LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))


def reported(cell: Cell, task: Task) -> float:
    """What the host's results say. PruningError if it has no such metric."""
    found = cell.results["results"][task.task]
    plain = {key.partition(",")[0]: value for key, value in found.items() if isinstance(value, (int, float))}
    for metric in task.metrics:
        if metric not in plain:
            raise unknown("metric", metric, plain, of=f" of {task.task} in {cell.folder}")
    return float(sum(plain[metric] for metric in task.metrics))


def _metric(cell: Cell, task: Task, value: float) -> Metric | None:
    """The metric as a function of questions; None where the host makes it of more than single questions."""
    if task.task in cell.unscored:
        return None
    answers = list(cell.answers(task.task).values())
    if task.metrics == [F1]:
        said = np.array([statistics.normal(each.answer) == statistics.YES for each in answers])
        true = np.array([statistics.normal(each.target) == statistics.YES for each in answers])
        return lambda which: _f1(said[which], true[which])
    correct = np.array([each.correct for each in answers])
    return (lambda which: float(correct[which].mean())) if np.isclose(correct.mean(), value, atol=1e-6) else None


def _f1(said: NDArray, true: NDArray) -> float:
    both = int((said & true).sum())
    return 2 * both / max(1, int(said.sum()) + int(true.sum()))


PAGE, DATA = "reproduced.md", "reproduced.csv"


def check(folder: Path) -> None:
    """Refuse a run folder that cannot take the table, before it is made."""
    for name in (PAGE, DATA) if files.check_folder(folder).is_dir() else ():
        files.check_output(folder / name)


def write(made: Table, folder: Path) -> None:
    """The table beside the run."""
    files.write(folder / PAGE, made.markdown() + "\n")
    files.write(folder / DATA, made.csv())
