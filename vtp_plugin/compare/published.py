"""Papers' tables as data: plugin_configs/published/MODEL.yaml, and any file of the same form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from vtp_plugin import files
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.reporting.schema import Written, checked
from vtp_plugin.settings import CONFIGS

FOLDER = CONFIGS / "published"
UNPRUNED = "none"


class Host(Written):
    """What lmms-eval runs."""

    model: str
    model_args: str


class Task(Written):
    """What the host calls a task, and which of its numbers the tables print; several metrics are summed."""

    task: str
    metric: str | list[str]
    scale: float | int = 100  # of the tables: 100 for %, 1 as the host says
    note: str = ""

    @property
    def metrics(self) -> list[str]:
        return [self.metric] if isinstance(self.metric, str) else self.metric


class Source(Written):
    """A paper, and where in it the numbers stand."""

    title: str
    table: str
    unpruned: dict[str, float | int]  # the unpruned model, per task, as the same table prints it


class Setting(Written):
    """How a method is run at a budget."""

    pruning: str
    pruning_args: dict[str, Any] = {}


class Row(Written):
    """One line of a table."""

    source: str
    method: str
    tokens: str | int  # the budget as printed
    numbers: dict[str, float | int]  # per task

    @property
    def budget(self) -> str:
        return str(self.tokens)


class Published(Written):
    """All tables of one model."""

    title: str
    tokens: int | None  # of a picture without pruning
    host: Host
    tasks: dict[str, Task]
    sources: dict[str, Source]
    settings: dict[str, dict[str, Setting]]
    unset: dict[str, str] = Field(default={})  # methods that are not run, and why
    rows: list[Row]

    def setting(self, row: Row) -> Setting | None:
        """None for a row that no paper says how to run."""
        return self.settings.get(row.method, {}).get(row.budget)

    def why_not(self, row: Row) -> str:
        return self.unset.get(row.method, "no setting is published for this budget")


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> Published:
    """The tables of a model by its name, or of a file. PruningError for an unknown name and a file of another form."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file() and path.parent == FOLDER:
        raise unknown("published model", name, names())
    tables = checked(Published, files.read_yaml(path), str(path))
    for row in tables.rows:
        _check(row, tables, path)
    for source in tables.sources.values():
        _known(source.unpruned, tables.tasks, "task", path)
    return tables


def _check(row: Row, tables: Published, path: Path) -> None:
    _known([row.source], tables.sources, "source", path)
    _known(row.numbers, tables.tasks, "task", path)
    _known(row.numbers, tables.sources[row.source].unpruned, f"unpruned number of {row.source} for task", path)
    if row.method not in tables.settings and row.method not in tables.unset:
        raise PruningError(f"{path}: {row.method} has neither settings nor a reason under unset")


def _known(names: Any, known: Any, kind: str, path: Path) -> None:
    for name in names:
        if name not in known:
            raise unknown(kind, str(name), known, of=f" in {path}")


def chosen(
    tables: Published, methods: list[str], budgets: list[str], tasks: list[str], sources: list[str] | None = None
) -> list[Row]:
    """The rows of these methods, budgets and sources that have a number for one of the tasks; empty lists: all."""
    asked = {"method": methods, "tokens": budgets, "source": sources or []}
    for kind, wanted in asked.items():
        there = {_of(row, kind) for row in tables.rows}
        for value in wanted:
            if value not in there:
                raise unknown(kind, value, sorted(there), of=f" in the tables of {tables.title}")
    _known(tasks, tables.tasks, "task", Path(tables.title))
    fits = [row for row in tables.rows if all(not want or _of(row, kind) in want for kind, want in asked.items())]
    found = [row for row in fits if not tasks or set(row.numbers) & set(tasks)]
    if not found:
        raise PruningError(f"{tables.title}: no table prints such a row; see vtp reproduce --list")
    return found


def _of(row: Row, kind: str) -> str:
    return str(getattr(row, kind))
