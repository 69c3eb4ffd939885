"""A run folder as one HTML page that needs nothing else: table, accuracy against cost, gallery."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtp_plugin.reporting import charts, comparison, overlays, timing
from vtp_plugin.reporting.cards import Cards
from vtp_plugin.reporting.controls import CONTROLS
from vtp_plugin.reporting.rows import rows
from vtp_plugin.reporting.runs import BASELINE, Run
from vtp_plugin.reporting.verdicts import warnings
from vtp_plugin.version import __version__

TEMPLATES = Path(__file__).parent / "templates"
OVER = ("over", "over_at_equal_layers")
COLOURS = 12  # that the page has for methods
CAPTION = (
    "Accuracy in %, with 95 % intervals; mean: over the tasks. Change: of the mean, paired by question, in points.",
    "Over random: the same against random tokens (all seeds), as many in the last layer or the next fewer, down to "
    "half.",
    "At equal layers: the same against random tokens that are as many on average over the decoder layers.",
    "Tokens: visual tokens per image that the last decoder layer sees, of all. KV: bytes of the KV cache.",
    "FLOPs: the whole prefill, vision tower included. TTFT: median time to first token, selection included, with the "
    "spread within the run (the middle half, of the median) and the machine's load average.",
    "KV, FLOPs and TTFT are relative to the unpruned model. Flips: answers that pruning made wrong / right, with "
    "McNemar's p. Same: answers equal to the unpruned ones.",
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

    found, groups, images = comparison.summary(run)["rows"], methods(run), Images()
    lines = list(found.values())
    cards = Cards(run, images.name).cards(samples)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    return environment.get_template("report.html.j2").render(
        version=__version__,
        title=f"Visual token pruning on {run.baseline.model[1]}",
        lead=_lead(run),
        warnings=[*_warnings(run), *timing.notes(run, lines)],
        caption=" ".join(text for text in CAPTION if _held(lines) or not text.startswith(("Over random", "At equal"))),
        columns=_columns(run, lines),
        rows=_rows(lines, groups),
        charts=_charts(lines, groups),
        methods=[{"name": n, "group": g, "mark": charts.marker(g)} for n, g in groups.items()],
        scale=overlays.scale(),
        veil=overlays.css(overlays.VEIL),
        cards=cards,
        tiled=any(image["tiled"] for card in cards for tile in card["tiles"] for image in tile["images"]),
        shown=[{"id": i, "label": v["label"], "group": groups[v["pruning"]]} for i, v in list(found.items())[1:]],
        tasks=run.tasks,
        images=images.data,
        facts=_facts(run),
    )


def methods(run: Run) -> dict[str, int]:
    """The colour of every method, by the order in which they were asked for."""
    names = dict.fromkeys(cell.pruning for cell in run if cell.pruning != BASELINE)
    return {name: number % COLOURS for number, name in enumerate(names)}


def _held(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is a control to hold methods against."""
    return any(CONTROLS[0] in line["over"] for line in lines)


# -- the head and the foot --------------------------------------------------------------------------------------------


def _lead(run: Run) -> str:
    questions = sum(len(run.baseline.answers(task)) for task in run.tasks)
    compared = len(rows(run)) - 1
    return (
        f"{compared} configurations of {len(methods(run))} methods against the unpruned model, "
        f"on {questions} questions of {len(run.tasks)} tasks."
    )


def _warnings(run: Run) -> list[str]:
    """Whatever keeps a reader from trusting the numbers."""
    said = [_sentence(text.removeprefix("WARNING: ")) for text in warnings(run)]
    said += [f"{cell.label} failed: {cell.error}" for cell in run.failed]
    return said + ([f"Not finished yet: {', '.join(run.unfinished)}."] if run.unfinished else [])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _facts(run: Run) -> list[tuple[str, str]]:
    record, settings = run.baseline.record, run.settings
    said = {name: settings.get(name) for name in ("model", "model_args", "limit")}
    return [
        ("Evaluation", _joined({"tasks": " ".join(settings.get("tasks") or []), **said})),
        ("Model", _joined(record.get("model", {}))),
        ("Versions", _joined(record.get("versions", {}))),
        ("Machine", timing.facts(run)),
        ("FLOPs", record.get("prefill_flops", {}).get("convention", "not counted")),
    ]


def _joined(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, ""))


# -- the table --------------------------------------------------------------------------------------------------------


def _columns(run: Run, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    names = {"configuration": "", "mean": "mean accuracy over the tasks", "change": "of the mean, in points"}
    if _held(lines):
        names |= {"over random": "of the mean from as many random tokens in the last layer, in points"}
        names |= {"at equal layers": "of the mean from as many random tokens over all decoder layers, in points"}
    names |= {"tokens": "", "KV": "bytes of the KV cache", "FLOPs": "", "TTFT": "time to first token"}
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
            + [_points(line["difference"] if number else None)]
            + ([_points(line[over].get(CONTROLS[0])) for over in OVER] if _held(lines) else [])
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
    value = _of(line, task)
    interval = line["mean_interval"] if task is None else line["tasks"][task]["accuracy"]
    small = f"{100 * interval['low']:.0f}\u2013{100 * interval['high']:.0f}"
    return _cell(value, f"{100 * value:.1f}", small, best=best.get(task) == value)


def _points(estimate: Mapping[str, float] | None) -> dict[str, Any]:
    """A difference with its interval; nothing where there is none."""
    if estimate is None:
        return _cell(None, "")
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return _cell(value, f"{value:+.1f}", f"{low:+.1f} \u2026 {high:+.1f}")


def _costs(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    before, after = line["tokens"]["before"], line["tokens"]["after"]
    spread, load = timing.spread(line["record"]), timing.load(line["record"])
    small = [f"\u00b1{50 * spread:.0f} %"] if spread is not None else []
    small += [f"load {load:.1f}"] if load is not None else []
    return [
        _cell(after, f"{after:.0f}", f"of {before:.0f}"),
        _times(line["kv_ratio"]),
        _times(line["flops_ratio"]),
        _times(line["ttft_ratio"], ", ".join(small)),
    ]


def _times(ratio: float | None, small: str = "") -> dict[str, Any]:
    return _cell(ratio, "-" if ratio is None else f"{ratio:.2f}x", small)


def _changed(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    p = line["mcnemar_p"]
    small = "mean of the seeds" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    flips = f"\u2212{line['lost']:.0f} / +{line['won']:.0f}"
    return [_cell(line["lost"], flips, small), _cell(line["agreement"], f"{100 * line['agreement']:.0f} %")]


def _cell(value: float | None, text: str, small: str = "", *, best: bool = False) -> dict[str, Any]:
    return {"value": "" if value is None else f"{value:g}", "text": text, "small": small, "best": best}


# -- the charts -------------------------------------------------------------------------------------------------------

COSTS = {  # title: name on the axis, and the cost relative to the unpruned model
    "Visual tokens": ("visual tokens", lambda line: _share(line["tokens"]["after"], line["tokens"]["before"])),
    "FLOPs": ("prefill FLOPs", lambda line: line["flops_ratio"]),
    "Time to first token": ("time to first token", lambda line: line["ttft_ratio"]),
}


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


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
