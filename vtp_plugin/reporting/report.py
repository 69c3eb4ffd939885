"""A run folder as one HTML page that needs nothing else: table, accuracy against cost, gallery."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtp_plugin.reporting import charts
from vtp_plugin.reporting.cards import Cards
from vtp_plugin.reporting.measures import Measures
from vtp_plugin.reporting.runs import BASELINE, Run
from vtp_plugin.version import __version__

TEMPLATES = Path(__file__).parent / "templates"
COLOURS = 12  # that the page has for methods
COSTS = {
    "Visual tokens": ("visual tokens", lambda m: m.kept),
    "FLOPs": ("prefill FLOPs", lambda m: m.flops),
    "Time to first token": ("time to first token", lambda m: m.first_token),
}
CAPTION = (
    "Accuracy in %, with 95 % intervals. Tokens: visual tokens per image that the last decoder layer sees, of all. "
    "FLOPs: the whole prefill, vision tower included. TTFT: time to first token, vision tower and prefill. Both are "
    "relative to the unpruned model. Change: of the mean, paired by question. Flips: answers that pruning made "
    "wrong / right, with McNemar's p. Same: answers equal to the unpruned ones."
)


class Images:
    """Pictures of the page, each stored once: its class in the page's style -> its data."""

    def __init__(self) -> None:
        self.names: dict[bytes, str] = {}
        self.data: dict[str, str] = {}

    def name(self, data: bytes, kind: str) -> str:
        """The class of a picture; `kind` is png or jpeg."""
        if data not in self.names:
            self.names[data] = name = f"i{len(self.names)}"
            self.data[name] = f"data:image/{kind};base64,{b64encode(data).decode()}"
        return self.names[data]


def page(run: Run, samples: int | None = None) -> str:
    """The page; `samples`: documents per task in its gallery, None for all that were recorded."""
    from jinja2 import Environment, FileSystemLoader

    measures = [Measures(cell, run.baseline) for cell in run]
    groups = methods(run)
    images = Images()
    cards = Cards(run, images.name).cards(samples)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    return environment.get_template("report.html.j2").render(
        version=__version__,
        title=_title(run),
        lead=_lead(run),
        warnings=_warnings(run, measures),
        caption=CAPTION,
        columns=_columns(run),
        rows=_rows(measures, groups),
        charts=_charts(measures, groups),
        methods=[{"name": name, "group": group} for name, group in groups.items()],
        cards=cards,
        shown=[{"id": c.id, "label": c.label, "group": groups[c.pruning]} for c in run if c.pruning != BASELINE],
        tasks=run.tasks,
        images=images.data,
        facts=_facts(run),
    )


def methods(run: Run) -> dict[str, int]:
    """The colour of every method, by the order in which they were asked for."""
    names = dict.fromkeys(cell.pruning for cell in run if cell.pruning != BASELINE)
    return {name: number % COLOURS for number, name in enumerate(names)}


# -- the head and the foot --------------------------------------------------------------------------------------------


def _title(run: Run) -> str:
    return f"Visual token pruning on {run.baseline.model[1]}"


def _lead(run: Run) -> str:
    questions = sum(len(run.baseline.answers(task)) for task in run.tasks)
    compared = len([cell for cell in run if cell.pruning != BASELINE])
    return (
        f"{compared} configurations of {len(methods(run))} methods against the unpruned model, "
        f"on {questions} questions of {len(run.tasks)} tasks."
    )


def _warnings(run: Run, measures: Sequence[Measures]) -> list[str]:
    """Whatever keeps a reader from trusting the numbers."""
    said = [f"{cell.label} failed: {cell.error}" for cell in run.failed]
    if run.unfinished:
        said.append(f"Not finished yet: {', '.join(run.unfinished)}.")
    return said


def _facts(run: Run) -> list[tuple[str, str]]:
    record = run.baseline.record
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    model = ", ".join(f"{name} {value}" for name, value in record["model"].items())
    facts = [("Model", model), ("Versions", versions), ("FLOPs", record["prefill_flops"]["convention"])]
    return facts + [(cell.label, cell.id) for cell in run.failed]


# -- the table --------------------------------------------------------------------------------------------------------


def short(task: str, tasks: Sequence[str]) -> str:
    """A task's name without what all names of the run begin with."""
    parts = [name.split("_") for name in tasks]
    shared = next((n for n, words in enumerate(zip(*parts, strict=False)) if len(set(words)) > 1), 0)
    return "_".join(task.split("_")[shared:])


def _columns(run: Run) -> list[dict[str, str]]:
    names = {"configuration": "", "mean": "mean accuracy over the tasks", "change": "of the mean, in points"}
    names |= {"tokens": "", "FLOPs": "", "TTFT": "time to first token"}
    names |= {"flips": "answers that became wrong / right", "same": "answers equal to the unpruned model's"}
    names |= {short(task, run.tasks): f"accuracy on {task}" for task in run.tasks}
    return [{"name": name, "title": title or name} for name, title in names.items()]


def _rows(measures: Sequence[Measures], groups: Mapping[str, int]) -> list[dict[str, Any]]:
    pruned = [m for m in measures if m.cell.pruning != BASELINE]
    best = {task: max((m.accuracies[task].value for m in pruned), default=2.0) for task in measures[0].tasks}
    top = max((m.mean.value for m in pruned), default=2.0)
    return [
        {
            "label": m.cell.label,
            "group": groups.get(m.cell.pruning, 0),
            "unpruned": m.cell.pruning == BASELINE,
            "cells": _cells(m, best, top),
        }
        for m in measures
    ]


def _cells(m: Measures, best: Mapping[str, float], top: float) -> list[dict[str, Any]]:
    pruned = m.cell.pruning != BASELINE
    tokens = m.tokens
    return [
        _accuracy(m.mean, pruned and m.mean.value == top),
        _change(m) if pruned else _cell(None, ""),
        _cell(tokens["mean_after"], f"{tokens['mean_after']:.0f}", small=f"of {tokens['mean_before']:.0f}"),
        _ratio(m.flops),
        _ratio(m.first_token),
        _flips(m) if pruned else _cell(None, ""),
        _cell(m.agreement, f"{100 * m.agreement:.0f} %") if pruned else _cell(None, ""),
        *(_accuracy(m.accuracies[task], pruned and m.accuracies[task].value == best[task]) for task in m.tasks),
    ]


def _change(m: Measures) -> dict[str, Any]:
    interval = f"{100 * m.change.low:+.1f} \u2026 {100 * m.change.high:+.1f}"
    return _cell(m.change.value, f"{100 * m.change.value:+.1f}", small=interval)


def _flips(m: Measures) -> dict[str, Any]:
    small = "p < 0.001" if m.flips.p < 0.001 else f"p = {m.flips.p:.3f}"
    return _cell(m.flips.lost, f"\u2212{m.flips.lost} / +{m.flips.won}", small=small)


def _ratio(value: float | None) -> dict[str, Any]:
    return _cell(value, "-" if value is None else f"{value:.2f}x")


def _accuracy(estimate: Any, best: bool) -> dict[str, Any]:
    small = f"{100 * estimate.low:.0f}\u2013{100 * estimate.high:.0f}"
    return _cell(estimate.value, f"{100 * estimate.value:.1f}", small=small, best=best)


def _cell(value: Any, text: str, *, small: str = "", best: bool = False) -> dict[str, Any]:
    return {"value": "" if value is None else f"{value:g}", "text": text, "small": small, "best": best}


# -- the charts -------------------------------------------------------------------------------------------------------


def _charts(measures: Sequence[Measures], groups: Mapping[str, int]) -> list[dict[str, str]]:
    pruned = [m for m in measures if m.cell.pruning != BASELINE]
    unpruned = next(m for m in measures if m.cell.pruning == BASELINE)
    drawn = []
    for number, (title, (cost, of)) in enumerate(COSTS.items()):
        if not pruned or any(of(m) is None for m in measures):
            continue
        points = [_point(m, groups[m.cell.pruning], of(m)) for m in pruned]
        svg = charts.scatter(points, _point(unpruned, 0, of(unpruned)), cost, f"chart{number}")
        drawn.append({"title": title, "svg": svg})
    return drawn


def _point(m: Measures, group: int, x: float) -> charts.Point:
    mean = m.mean
    return charts.Point(m.cell.label, group, x, 100 * mean.value, 100 * mean.low, 100 * mean.high)
