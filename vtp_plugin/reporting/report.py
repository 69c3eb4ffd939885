"""A run folder as one HTML page that needs nothing else: table, accuracy against cost, gallery."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtp_plugin.reporting import charts, comparison
from vtp_plugin.reporting.cards import Cards
from vtp_plugin.reporting.comparison import Row
from vtp_plugin.reporting.runs import BASELINE, Run
from vtp_plugin.version import __version__

TEMPLATES = Path(__file__).parent / "templates"
COLOURS = 12  # that the page has for methods
CAPTION = (
    "Accuracy in %, with 95 % intervals. Change: of the mean, paired by question, in points. Tokens: visual tokens per "
    "image that the last decoder layer sees, of all. FLOPs: the whole prefill, vision tower included. TTFT: time to "
    "first token, vision tower and prefill. Both are relative to the unpruned model. Flips: answers that pruning made "
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

    lines, groups, images = _lines(run), methods(run), Images()
    cards = Cards(run, images.name).cards(samples)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    return environment.get_template("report.html.j2").render(
        version=__version__,
        title=f"Visual token pruning on {run.baseline.model[1]}",
        lead=_lead(run),
        warnings=_warnings(run),
        caption=CAPTION,
        columns=_columns(run),
        rows=_rows(lines, groups),
        charts=_charts(lines, groups),
        methods=[{"name": name, "group": group} for name, group in groups.items()],
        cards=cards,
        tiled=any(image["tiled"] for card in cards for tile in card["tiles"] for image in tile["images"]),
        shown=[{"id": c.id, "label": c.label, "group": groups[c.pruning]} for c in run if c.pruning != BASELINE],
        tasks=run.tasks,
        images=images.data,
        facts=_facts(run),
    )


def methods(run: Run) -> dict[str, int]:
    """The colour of every method, by the order in which they were asked for."""
    names = dict.fromkeys(cell.pruning for cell in run if cell.pruning != BASELINE)
    return {name: number % COLOURS for number, name in enumerate(names)}


def _lines(run: Run) -> list[dict[str, Any]]:
    """The statistics of every configuration, the unpruned model first, with its time to first token."""
    rows = comparison.rows(run)
    said = comparison.summary(run)["rows"]
    return [said[row.id] | {"first_token": _ratio(first_token(row), first_token(rows[0]))} for row in rows]


def first_token(row: Row) -> float | None:
    """Seconds per sample until the first token, tower and decoder layers; None where nothing was timed (vLLM)."""
    records = [cell.record for cell in row.cells if "seconds" in cell.record]
    spent = [(r["seconds"]["tower"] + r["seconds"]["prefill"]) / max(1, r["samples"]["total"]) for r in records]
    return float(np.mean(spent)) if spent else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part and whole else None


# -- the head and the foot --------------------------------------------------------------------------------------------


def _lead(run: Run) -> str:
    questions = sum(len(run.baseline.answers(task)) for task in run.tasks)
    compared = len([cell for cell in run if cell.pruning != BASELINE])
    return (
        f"{compared} configurations of {len(methods(run))} methods against the unpruned model, "
        f"on {questions} questions of {len(run.tasks)} tasks."
    )


def _warnings(run: Run) -> list[str]:
    """Whatever keeps a reader from trusting the numbers."""
    said = [text.replace("WARNING: not", "Not", 1) for text in comparison.warnings(run)]
    said += [f"{cell.label} failed: {cell.error}" for cell in run.failed]
    return said + ([f"Not finished yet: {', '.join(run.unfinished)}."] if run.unfinished else [])


def _facts(run: Run) -> list[tuple[str, str]]:
    record, settings = run.baseline.record, run.settings
    said = {name: settings.get(name) for name in ("model", "model_args", "limit")}
    return [
        ("Evaluation", _joined({"tasks": " ".join(settings.get("tasks") or []), **said})),
        ("Model", _joined(record.get("model", {}))),
        ("Versions", _joined(record.get("versions", {}))),
        ("FLOPs", record.get("prefill_flops", {}).get("convention", "not counted")),
    ]


def _joined(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, ""))


# -- the table --------------------------------------------------------------------------------------------------------


def _columns(run: Run) -> list[dict[str, str]]:
    names = {"configuration": "", "mean": "mean accuracy over the tasks", "change": "of the mean, in points"}
    names |= {"tokens": "", "FLOPs": "", "TTFT": "time to first token"}
    names |= {"flips": "answers that became wrong / right", "same": "answers equal to the unpruned model's"}
    names |= {short: f"accuracy on {task}" for short, task in zip(comparison.short(run.tasks), run.tasks, strict=True)}
    return [{"name": name, "title": title or name} for name, title in names.items()]


def _rows(lines: Sequence[Mapping[str, Any]], groups: Mapping[str, int]) -> list[dict[str, Any]]:
    best = {task: max((_of(line, task) for line in lines[1:]), default=2.0) for task in [None, *lines[0]["tasks"]]}
    return [
        {
            "label": line["label"] if number else "unpruned",
            "group": groups.get(line["pruning"], 0),
            "unpruned": number == 0,
            "cells": [_accuracy(line, None, best if number else {})]
            + (_compared(line) if number else [_cell(None, "")])
            + _costs(line)
            + (_changed(line) if number else [_cell(None, "")] * 2)
            + [_accuracy(line, task, best if number else {}) for task in line["tasks"]],
        }
        for number, line in enumerate(lines)
    ]


def _of(line: Mapping[str, Any], task: str | None) -> float:
    """The accuracy on a task; the mean for None."""
    return line["mean"] if task is None else line["tasks"][task]["accuracy"]["value"]


def _accuracy(line: Mapping[str, Any], task: str | None, best: Mapping[str | None, float]) -> dict[str, Any]:
    value, small = _of(line, task), ""
    if task is not None:
        interval = line["tasks"][task]["accuracy"]
        small = f"{100 * interval['low']:.0f}\u2013{100 * interval['high']:.0f}"
    return _cell(value, f"{100 * value:.1f}", small, best=best.get(task) == value)


def _compared(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    value, low, high = (100 * line["difference"][name] for name in ("value", "low", "high"))
    return [_cell(value, f"{value:+.1f}", f"{low:+.1f} \u2026 {high:+.1f}")]


def _costs(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    before, after = line["tokens"]["before"], line["tokens"]["after"]
    ratios = [line["flops_ratio"], line["first_token"]]
    return [_cell(after, f"{after:.0f}", f"of {before:.0f}")] + [
        _cell(ratio, "-" if ratio is None else f"{ratio:.2f}x") for ratio in ratios
    ]


def _changed(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    p = line["mcnemar_p"]
    small = "mean of the seeds" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    flips = f"\u2212{line['lost']:.0f} / +{line['won']:.0f}"
    return [_cell(line["lost"], flips, small), _cell(line["agreement"], f"{100 * line['agreement']:.0f} %")]


def _cell(value: float | None, text: str, small: str = "", *, best: bool = False) -> dict[str, Any]:
    return {"value": "" if value is None else f"{value:g}", "text": text, "small": small, "best": best}


# -- the charts -------------------------------------------------------------------------------------------------------

COSTS = {  # title: name on the axis, and the cost relative to the unpruned model
    "Visual tokens": ("visual tokens", lambda line: _ratio(line["tokens"]["after"], line["tokens"]["before"])),
    "FLOPs": ("prefill FLOPs", lambda line: line["flops_ratio"]),
    "Time to first token": ("time to first token", lambda line: line["first_token"]),
}


def _charts(lines: Sequence[Mapping[str, Any]], groups: Mapping[str, int]) -> list[dict[str, str]]:
    drawn = []
    for number, (title, (cost, of)) in enumerate(COSTS.items()):
        if len(lines) < 2 or any(of(line) is None for line in lines):
            continue
        unpruned, *points = (_point(line, lines[0]["mean"], groups, of(line)) for line in lines)
        drawn.append({"title": title, "svg": charts.scatter(points, unpruned, cost, f"chart{number}")})
    return drawn


def _point(line: Mapping[str, Any], unpruned: float, groups: Mapping[str, int], x: float) -> charts.Point:
    """With the interval of the difference from the unpruned accuracy."""
    if line["pruning"] == BASELINE:
        return charts.Point("unpruned", 0, x, 100 * line["mean"])
    low, high = (100 * (unpruned + line["difference"][name]) for name in ("low", "high"))
    return charts.Point(line["label"], groups[line["pruning"]], x, 100 * line["mean"], low, high)
