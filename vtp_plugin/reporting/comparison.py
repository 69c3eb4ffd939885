"""The cells of a run side by side: accuracy with its interval, the difference from the unpruned model, what it saves.

Runs that differ only in their random seed are one row: their values are averaged question by question, so that a
method can be compared with `random` over all its seeds, in pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vtp_plugin import files
from vtp_plugin.errors import unknown
from vtp_plugin.reporting import statistics
from vtp_plugin.reporting.runs import BASELINE, Cell, Run, Spec
from vtp_plugin.reporting.statistics import Estimate
from vtp_plugin.reporting.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vtp_plugin.reporting.views import View

CONTROLS = ("random", "stride")  # what a method has to beat
SCHEMA = 1
SCENES = 3
BEFORE_FIRST_TOKEN = ("image_processing", "tower", "selector", "projector", "prefill")


@dataclass(frozen=True)
class Row:
    """One configuration over all its seeds."""

    cells: Sequence[Cell]
    tasks: Sequence[str]

    @property
    def id(self) -> str:
        cell = self.cells[0]
        return cell.id.removesuffix(f"-seed{cell.seed}") if len(self.cells) > 1 else cell.id

    @property
    def label(self) -> str:
        cell = self.cells[0]
        seeds = f" ({len(self.cells)} seeds)" if len(self.cells) > 1 else ""
        return f"{cell.label.removesuffix(f'-seed{cell.seed}') if seeds else cell.label}{seeds}"

    @cached_property
    def values(self) -> dict[str, dict[int, float]]:
        """Task -> question -> value, averaged over the seeds."""
        return {
            task: statistics.pooled([{n: a.correct for n, a in cell.answers(task).items()} for cell in self.cells])
            for task in self.tasks
        }

    @property
    def mean(self) -> float:
        """The mean of the tasks' accuracies."""
        return float(np.mean([np.mean(list(values.values())) for values in self.values.values()]))

    @property
    def tokens(self) -> tuple[float, float]:
        """Visual tokens per image: all, and kept by the last layer."""
        counts = [cell.record["visual_tokens"] for cell in self.cells]
        return tuple(float(np.mean([count.get(key, 0.0) for count in counts])) for key in ("mean_before", "mean_after"))

    @property
    def budget(self) -> float:
        """Visual tokens as asked for, per image; where nothing was asked, as kept.

        What a method between decoder layers leaves behind its last cut is less than what it spends.
        """
        keep, (before, after) = self.cells[0].keep, self.tokens
        return after if keep is None else keep * before

    @property
    def flops(self) -> float | None:
        """Prefill FLOPs relative to the same prompts unpruned; None where the host's record has none (vLLM)."""
        found = [cell.record["prefill_flops"]["ratio"] for cell in self.cells if "prefill_flops" in cell.record]
        return float(np.mean(found)) if found else None

    @property
    def cache(self) -> float | None:
        """Bytes of the KV cache relative to the same prompts unpruned: what is spent, averaged over the layers."""
        found = [cell.record["kv_cache_bytes"]["ratio"] for cell in self.cells if "kv_cache_bytes" in cell.record]
        return float(np.mean(found)) if found else None

    @property
    def prefill(self) -> float | None:
        """Seconds in the decoder layers until the first token, per sample; None where nothing was timed."""
        timed = [cell.record for cell in self.cells if "seconds" in cell.record]
        seconds = [record["seconds"]["prefill"] / max(1, record["samples"]["total"]) for record in timed]
        return float(np.mean(seconds)) if seconds else None

    @property
    def first_token(self) -> float | None:
        """Median seconds until the first token, everything included; None where nothing was timed (vLLM)."""
        found = [seconds for cell in self.cells if (seconds := _first_token(cell.record)) is not None]
        return float(np.mean(found)) if found else None

    def answers(self, cell: Cell, task: str) -> list[str]:
        return [cell.answers(task)[number].answer for number in self.values[task]]

    def targets(self, task: str) -> list[str]:
        return [self.cells[0].answers(task)[number].target for number in self.values[task]]


def _first_token(record: Mapping[str, Any]) -> float | None:
    """Of one run; a record without medians (schema 1) has the mean of all parts before the first token."""
    if record.get("latency", {}).get("ttft"):
        return record["latency"]["ttft"]["p50"]
    parts = [record["seconds"].get(part, 0.0) for part in BEFORE_FIRST_TOKEN] if "seconds" in record else []
    return sum(parts) / max(1, record["samples"]["total"]) if parts else None


def rows(run: Run) -> list[Row]:
    """The unpruned model first, then the finished cells in their order, seeds together."""
    groups: dict[str, list[Cell]] = {}
    for cell in [run.baseline, *(cell for cell in run if cell.pruning != BASELINE)]:
        groups.setdefault(_without_seed(cell), []).append(cell)
    return [Row(cells, run.tasks) for cells in groups.values()]


def _without_seed(cell: Spec) -> str:
    fields = {key: value for key, value in cell.pruning_args.items() if key.rpartition(".")[2] != "seed"}
    return json.dumps([cell.pruning, fields, cell.seed is None and cell.id], sort_keys=True, default=str)


def difference(row: Row, other: Row, tasks: Sequence[str] | None = None) -> Estimate:
    """Mean over the tasks of the paired difference row - other, with its interval."""
    return statistics.difference([_paired(row, other, task) for task in tasks or row.tasks])


def _paired(row: Row, other: Row, task: str) -> list[float]:
    return [value - other.values[task][number] for number, value in row.values[task].items()]


# -- everything, for a program ----------------------------------------------------------------------------------------


def summary(run: Run) -> dict[str, Any]:
    """All statistics of every row, per task and over all tasks, with the first cell's record."""
    everything = rows(run)
    return {
        "schema": SCHEMA,
        "model": run.settings.get("model"),
        "model_args": run.settings.get("model_args"),
        "limit": run.settings.get("limit"),
        "rows": {row.id: _summarised(row, everything[0], _over_controls(row, everything)) for row in everything},
        "warnings": warnings(run),
    }


def _over_controls(row: Row, everything: Sequence[Row]) -> dict[str, Any]:
    """The paired difference from every control of the same or a smaller budget."""
    found = {control: over(row, everything, control) for control in CONTROLS}
    return {control: asdict(estimate) for control, estimate in found.items() if estimate is not None}


def _summarised(row: Row, unpruned: Row, over: Mapping[str, Any]) -> dict[str, Any]:
    cell, (before, after) = row.cells[0], row.tokens
    return {
        "label": row.label,
        "pruning": cell.pruning,
        "pruning_args": {key: value for key, value in cell.pruning_args.items() if key != "seed"},
        "keep": cell.keep,
        "seeds": [cell.seed for cell in row.cells if cell.seed is not None],
        "tokens": {"before": before, "after": after},
        "kv_ratio": row.cache,
        "flops_ratio": row.flops,
        "prefill_ratio": _ratio(row.prefill, unpruned.prefill),
        "ttft_ratio": _ratio(row.first_token, unpruned.first_token),
        "mean": row.mean,
        "mean_interval": asdict(statistics.difference([list(values.values()) for values in row.values.values()])),
        "difference": asdict(difference(row, unpruned)),
        "over": over,
        **_changes(row, unpruned, row.tasks),
        "tasks": {task: _task(row, unpruned, task) for task in row.tasks},
        "command": list(cell.command),
        "record": cell.record,
    }


def _task(row: Row, unpruned: Row, task: str) -> dict[str, Any]:
    targets = row.targets(task)
    asked = statistics.is_yes_no(targets)
    said = [statistics.yes_no(row.answers(cell, task), targets) for cell in row.cells if asked]
    return {
        "questions": len(targets),
        "accuracy": asdict(statistics.accuracy(list(row.values[task].values()))),
        "difference": asdict(difference(row, unpruned, [task])),
        **_changes(row, unpruned, [task]),
        **({"yes_no": _mean_of([asdict(one) for one in said])} if asked else {}),
    }


def _changes(row: Row, unpruned: Row, tasks: Sequence[str]) -> dict[str, Any]:
    """Flips and agreement against the unpruned answers over some tasks; several seeds: means, and no test."""
    base = unpruned.cells[0]
    found = []
    for cell in row.cells:
        pairs = [(base.answers(task)[n], answer) for task in tasks for n, answer in cell.answers(task).items()]
        turned = statistics.flips([a.correct for a, _ in pairs], [b.correct for _, b in pairs])
        same = statistics.agreement([a.answer for a, _ in pairs], [b.answer for _, b in pairs])
        found.append({"lost": turned.lost, "won": turned.won, "agreement": same, "mcnemar_p": turned.p})
    return found[0] if len(found) == 1 else {**_mean_of(found), "mcnemar_p": None}


def _mean_of(entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([entry[key] for entry in entries])) for key in entries[0]}


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


# -- everything, for a reader -----------------------------------------------------------------------------------------


def table(run: Run, title: str = "") -> Table:
    """Accuracy per task, difference from the unpruned model, flips, tokens, FLOPs and prefill time."""
    everything = rows(run)
    names, controlled = short(run.tasks), _controlled(run)
    changes = ["difference", *(["over random"] if controlled else []), "lost/won", "p", "same"]
    result = Table(["strategy", *names, "mean", *changes, "tokens", "KV", "FLOPs", "prefill"], title=title)
    for row in everything:
        changed = _compared(row, everything, controlled)
        result.add(row.label, *_accuracies(row), *changed, *_costs(row, everything[0]))
    caption = [said for said in CAPTION if controlled or said != OVER_RANDOM]
    result.caption = " ".join([*caption, *_left_out(run), *warnings(run)])
    result.findings = [*_left_out(run), *findings(run)]
    return result


def _controlled(run: Run) -> bool:
    """Whether there is a random control to hold methods against."""
    return any(cell.pruning == CONTROLS[0] for cell in run)


OVER_RANDOM = (
    "Over random: of the mean from random (all seeds) at the same or the next smaller budget, down to half, likewise."
)
CAPTION = (
    "Accuracy in %; mean: over the tasks.",
    "Difference: of the mean from the unpruned model, in points, with its 95 % paired bootstrap interval.",
    OVER_RANDOM,
    "Lost/won: answers that turned from right to wrong / from wrong to right; p: McNemar's exact test of these;",
    "same: answers equal to the unpruned ones, in %.",
    "Tokens: visual tokens per image, kept (by the last layer) / all.",
    "KV: bytes of the KV cache, so tokens averaged over the layers, text included, relative to the unpruned run.",
    "FLOPs: whole prefill, vision tower included, relative to the same prompts unpruned.",
    "Prefill: time in the decoder layers until the first token, relative to the unpruned run.",
)


def _accuracies(row: Row) -> list[str]:
    means = [np.mean(list(values.values())) for values in row.values.values()]
    return [f"{100 * mean:.1f}" for mean in (*means, np.mean(means))]


def _compared(row: Row, everything: Sequence[Row], controlled: bool) -> list[str]:
    unpruned = everything[0]
    if row.id == unpruned.id:
        return ["-"] * (4 + controlled)
    changes, chance = _changes(row, unpruned, row.tasks), over(row, everything, CONTROLS[0])
    p = changes["mcnemar_p"]
    return [
        points(difference(row, unpruned)),
        *(["-" if chance is None else points(chance)] if controlled else []),
        f"{changes['lost']:.0f}/{changes['won']:.0f}",
        "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}",
        f"{100 * changes['agreement']:.1f}",
    ]


def _costs(row: Row, unpruned: Row) -> list[str]:
    before, after = row.tokens
    prefill = _ratio(row.prefill, unpruned.prefill)
    times = ["-" if ratio is None else f"{ratio:.2f}x" for ratio in (row.cache, row.flops, prefill)]
    return [f"{after:.0f}/{before:.0f}", *times]


def points(estimate: Estimate) -> str:
    """A difference in percentage points: -2.1 [-4.0, -0.2]."""
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def short(tasks: Sequence[str]) -> list[str]:
    """Names of tasks without what all of them begin with: vtp_scenes_count becomes count."""
    first = tasks[0].split("_") if len(tasks) > 1 else []
    while first and not all(task.startswith("_".join(first) + "_") for task in tasks):
        first.pop()
    return [task.removeprefix("_".join([*first, ""]) if first else "") for task in tasks]


def _left_out(run: Run) -> list[str]:
    """Sentences on what the table does not show."""
    unscored = sorted({task for cell in run for task in cell.unscored})
    said = [f"No value per question, so not compared: {', '.join(unscored)}."] if unscored else []
    said += [f"Failed: {', '.join(cell.id for cell in run.failed)}."] if run.failed else []
    return said + ([f"Not run yet: {', '.join(run.unfinished)}."] if run.unfinished else [])


def warnings(run: Run) -> list[str]:
    """One sentence per control that methods of the same or a larger budget are not shown to beat."""
    said = []
    for control, behind in _behind(run).items():
        named = "; ".join(f"{_named(row)} ({points(gain)})" for row, gain in behind)
        said.append(
            f"WARNING: not shown to be better than {control} at the same or a smaller budget "
            f"(mean difference with its 95 % interval, n = {_questions(run)} questions): {named}."
        )
    return said


def findings(run: Run) -> list[str]:
    """The same, one short line per method and budget."""
    return [
        f"not shown to be better than {control}: {_named(row)}, {points(gain)}, n = {_questions(run)}"
        for control, behind in _behind(run).items()
        for row, gain in behind
    ]


def _behind(run: Run) -> dict[str, list[tuple[Row, Estimate]]]:
    """Control -> the rows whose interval over it reaches zero or lies below, if there are any."""
    everything = rows(run)
    found = {c: [(row, over(row, everything, c)) for row in everything] for c in CONTROLS}
    behind = {c: [(row, gain) for row, gain in each if gain is not None and gain.low <= 0] for c, each in found.items()}
    return {control: each for control, each in behind.items() if each}


def _questions(run: Run) -> int:
    return sum(len(run.baseline.answers(task)) for task in run.tasks)


def _named(row: Row) -> str:
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


def over(row: Row, everything: Sequence[Row], control: str) -> Estimate | None:
    """The difference from the control's largest budget within the row's; None without one, and for a control.

    A control with less than half of the row's budget is none: anything beats it.
    """
    if row.cells[0].pruning in (BASELINE, *CONTROLS):
        return None
    within = [r for r in everything if r.cells[0].pruning == control and row.budget / 2 <= r.budget <= row.budget + 0.5]
    return difference(row, max(within, key=lambda r: r.budget)) if within else None


FILES = ("table.md", "table.csv", "table.tex", "summary.json")


def check(folder: Path) -> None:
    """Refuse a run folder whose results cannot be written, before they are made."""
    for name in FILES if folder.is_dir() else ():
        files.check_output(folder / name)


def write(run: Run, title: str = "") -> Table:
    """table.md, table.csv, table.tex and summary.json in the run folder; the table."""
    made = table(run, title)
    texts = (made.markdown() + "\n", made.csv(), made.latex(), json.dumps(summary(run), indent=1) + "\n")
    for name, text in zip(FILES, texts, strict=True):
        files.write(run.folder / name, text)
    return made


def kept_picture(specs: Sequence[Spec]) -> Figure:
    """What every configuration keeps of the first test scenes, and whether the answers are right."""
    from vtp_plugin import config
    from vtp_plugin.reporting.figures import kept_figure
    from vtp_plugin.reporting.views import view
    from vtp_plugin.tiny.examples import examples
    from vtp_plugin.tiny.inference import load

    model, processor = load()

    def seen(spec: Spec, picture: Any, question: str, target: str) -> View:
        chosen = config.resolve(spec.pruning, spec.pruning_args)
        return view(model, processor, picture, question, chosen, spec.pruning, target=target)

    return kept_figure([[seen(spec, *scene) for spec in specs] for scene in examples(SCENES)])
