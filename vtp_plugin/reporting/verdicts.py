"""Sentences and one table on differences: who is not shown to beat a control, one method against every other."""

from __future__ import annotations

from vtp_plugin.errors import unknown
from vtp_plugin.reporting.controls import Controls
from vtp_plugin.reporting.rows import Row, difference, rows
from vtp_plugin.reporting.runs import Run
from vtp_plugin.reporting.statistics import Estimate
from vtp_plugin.reporting.tables import Table


def points(estimate: Estimate) -> str:
    """A difference in percentage points: -2.1 [-4.0, -0.2]."""
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def left_out(run: Run) -> list[str]:
    """Sentences on what the table does not show."""
    unscored = sorted({task for cell in run for task in cell.unscored})
    said = [f"No value per question, so not compared: {', '.join(unscored)}."] if unscored else []
    said += [f"Failed: {', '.join(cell.id for cell in run.failed)}."] if run.failed else []
    return said + ([f"Not run yet: {', '.join(run.unfinished)}."] if run.unfinished else [])


def warnings(run: Run, controls: Controls | None = None) -> list[str]:
    """One sentence per control and budget that methods are not shown to beat."""
    said = []
    for (control, budget), behind in (controls or Controls(rows(run))).behind().items():
        named_ = "; ".join(f"{named(held.row)} ({points(held.gain)})" for held in behind)
        said.append(
            f"WARNING: not shown to be better than {control} at equal {budget} (mean difference with its 95 % "
            f"interval, n = {_questions(run)} questions; p > 0.05 after Holm's correction): {named_}."
        )
    return said


def findings(run: Run, controls: Controls | None = None) -> list[str]:
    """The same, one short line per method and budget."""
    return [
        f"not shown to be better than {control} at equal {budget}: {named(held.row)}, {points(held.gain)}, "
        f"n = {_questions(run)}"
        for (control, budget), behind in (controls or Controls(rows(run))).behind().items()
        for held in behind
    ]


def _questions(run: Run) -> int:
    return sum(len(run.baseline.answers(task)) for task in run.tasks)


def named(row: Row) -> str:
    """`atp at 0.25`, `vprune`."""
    keep = row.cells[0].keep
    return _method(row) + ("" if keep is None else f" at {keep:g}")


def _method(row: Row) -> str:
    """The name of a row without its budget."""
    keep = row.cells[0].keep
    return row.id if keep is None else row.id.replace(f"-{keep:g}", "", 1)


def versus(run: Run, name: str) -> Table:
    """One method against every other at the same nominal budget: paired differences of the mean of the tasks.

    PruningError for a method that has no row with a budget in this run.
    """
    budgeted = [row for row in rows(run) if row.cells[0].keep is not None]
    found = {(_method(row), row.cells[0].keep): row for row in budgeted}
    methods, keeps = dict.fromkeys(method for method, _ in found), dict.fromkeys(keep for _, keep in found)
    if name not in methods:
        raise unknown("method with a budget in this run", name, methods)
    result = Table([f"{name} minus", *(f"at {keep:g}" for keep in keeps)], caption=VERSUS)
    for method in methods:
        pairs = [(found.get((name, keep)), found.get((method, keep))) for keep in keeps]
        if method != name:
            result.add(method, *(points(difference(*pair)) if all(pair) else "-" for pair in pairs))
    return result


VERSUS = (
    "Mean over the tasks, in points, with the 95 % paired bootstrap interval of each difference by itself: of many "
    "differences some leave 0 out by chance."
)
