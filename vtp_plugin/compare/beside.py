"""The unpruned model of a run beside what papers print of it: a comparison from another level says little."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vtp_plugin.compare import published
from vtp_plugin.compare.published import Published, Task
from vtp_plugin.compare.reproduce import measured
from vtp_plugin.reporting.runs import Run

FAR = 2.0  # points, or % of a sum such as MME's, that the printed number may lie outside of our interval
PIXELS = ("min_pixels", "max_pixels", "max_num", "total_pixels")  # of model_args: what caps a picture


def lines(run: Run) -> list[str]:
    """A sentence per published task that the run asked; a WARNING where the unpruned model is far from it."""
    alike = [tables for tables in map(published.read, published.names()) if _same(tables, run)]
    return [said for tables in alike for said in _of(tables, run)]


def _same(tables: Published, run: Run) -> bool:
    """Whether the run's checkpoint is the published one, whoever hosts it."""
    return _checkpoint(tables.host.model_args) == _checkpoint(str(run.settings.get("model_args") or ""))


def _checkpoint(model_args: str) -> str:
    """`liuhaotian/llava-v1.5-7b` and `llava-hf/llava-1.5-7b-hf` are the same weights."""
    name = _arguments(model_args).get("pretrained", "").rpartition("/")[2].lower()
    return name.removesuffix("-hf").replace("llava-v", "llava-")


def _arguments(model_args: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in model_args.split(",") if "=" in part)


def _of(tables: Published, run: Run) -> Iterator[str]:
    for name, task in tables.tasks.items():
        printed = {key: source.unpruned[name] for key, source in tables.sources.items() if name in source.unpruned}
        if printed and task.task in run.tasks:
            yield _sentence(tables, task, printed, run)


def _sentence(tables: Published, task: Task, printed: dict[str, Any], run: Run) -> str:
    ours, _ = measured(run.baseline, run.baseline, task)
    low, high = (ours.value if end is None else end for end in (ours.low, ours.high))
    slack = FAR if task.scale == 100 else FAR / 100 * max(printed.values())
    near = any(low - slack <= value <= high + slack for value in printed.values())
    said = ", ".join(f"{value:g} ({key})" for key, value in printed.items())
    interval = "" if ours.low is None else f" [{low:.1f}, {high:.1f}]"
    variant = f"{task.task}, {' + '.join(task.metrics)}; {_pixels(run)}"
    note = f"; {task.note}" if task.note else ""
    start = "" if near else "WARNING: far from what papers print: "
    return f"{start}unpruned {tables.title}, {variant}: ours {ours.value:.1f}{interval}, published {said}{note}."


def _pixels(run: Run) -> str:
    """What caps the size of a picture."""
    given = _arguments(str(run.settings.get("model_args") or ""))
    return ", ".join(f"{key}={given[key]}" for key in PIXELS if key in given) or "pictures as the processor's defaults"
