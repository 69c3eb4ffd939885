"""One static page of committed records: every number links the record it comes from and the command that made it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtp_plugin import files
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting import summary
from vtp_plugin.version import __version__

TEMPLATES = Path(__file__).parent / "templates"
MEAN = "mean of the tasks"
SUMMARY, HOST, RECORD = "summary.json", "_results.json", "results.json"


@dataclass(frozen=True)
class Entry:
    """One configuration on one task, from one record."""

    method: str
    setting: str  # what is not the method's default
    family: str
    model: str
    task: str
    questions: int
    keep: float | None  # kept / all visual tokens
    tokens: tuple[float, float]  # kept, all
    kv: float | None
    flops: float | None
    ttft: float | None
    accuracy: float
    low: float | None
    high: float | None
    change: Mapping[str, float] | None  # from the unpruned model
    over: Mapping[str, float] | None  # from random, as many tokens in the last layer
    layered: Mapping[str, float] | None  # from random, as many tokens x layers
    record: Path
    command: str


def entries(folders: Sequence[Path]) -> list[Entry]:
    """Of all records below the folders, or at these files. PruningError if there are none, or one is not whole."""
    found = [entry for folder in folders for path in _records(folder) for entry in _entries(path)]
    if not found:
        said = ", ".join(map(str, folders))
        raise PruningError(f"no records in {said}: expected {SUMMARY} of vtp compare, or lmms-eval's *{HOST}")
    return found


def _records(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise PruningError(f"not found: {folder}")
    compared = sorted(folder.rglob(SUMMARY))
    inside = {path.parent for path in compared}
    alone = sorted(path for pattern in (f"*{HOST}", RECORD) for path in folder.rglob(pattern))
    return compared + [path for path in alone if not inside & set(path.parents)]


def _entries(path: Path) -> Iterator[Entry]:
    content = files.read_json(path)
    try:
        if "rows" in content:
            yield from _compared(content, path)
        elif "pruning" in content:
            yield from _evaluated(content, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise PruningError(f"{path}: not a record that can be read ({type(error).__name__}: {error})") from None


# -- a comparison -----------------------------------------------------------------------------------------------------


def _compared(content: Mapping[str, Any], path: Path) -> Iterator[Entry]:
    """Every row of a summary.json on every task, and over all of them."""
    rows = content["rows"]
    whole = rows.get("none", {})
    for row in rows.values():
        common = _common(content, row, whole, path)
        if len(row["tasks"]) > 1:
            questions = sum(task["questions"] for task in row["tasks"].values())
            ends = row.get("mean_interval") or {}
            over = [(row.get(key) or {}).get("random") for key in ("over", "over_at_equal_layers")]
            accuracy = (row["mean"], ends.get("low"), ends.get("high"))
            yield _entry(common, MEAN, questions, accuracy, row["difference"], over)
        for name, task in row["tasks"].items():
            accuracy = tuple(task["accuracy"][key] for key in ("value", "low", "high"))
            yield _entry(common, name, task["questions"], accuracy, task["difference"], (None, None))


def _entry(common: dict[str, Any], task: str, questions: int, accuracy: tuple, change: Any, over: Any) -> Entry:
    value, low, high = accuracy
    pruned = common["method"] != summary.name([])
    more = {"change": change if pruned else None, "over": over[0], "layered": over[1]}
    return Entry(**common, task=task, questions=questions, accuracy=value, low=low, high=high, **more)


def _common(content: Mapping[str, Any], row: Mapping[str, Any], whole: Mapping[str, Any], path: Path) -> dict[str, Any]:
    before, after = row["tokens"]["before"], row["tokens"]["after"]
    ttft = row.get("ttft_ratio") or _share(_median(row["record"]), _median(whole.get("record", {})))
    return {
        "method": "unpruned" if row["pruning"] == "none" else row["pruning"],
        "setting": _setting(row),
        "family": row["record"].get("model", {}).get("family", ""),
        "model": _checkpoint(content.get("model_args") or "") or content.get("model") or "",
        "keep": _share(after, before),
        "tokens": (after, before),
        "kv": row.get("kv_ratio"),
        "flops": row.get("flops_ratio"),
        "ttft": ttft,
        "record": path,
        "command": _command(content, row),
    }


def _setting(row: Mapping[str, Any]) -> str:
    said = [f"{key}={value}" for key, value in row["pruning_args"].items()]
    return ", ".join(said + ([f"{len(row['seeds'])} seeds"] if len(row.get("seeds") or []) > 1 else []))


def _command(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """What ran it; a record without a command says enough to build one."""
    if row.get("command"):
        return shlex.join(row["command"])
    pairs = ",".join(f"{key}={value}" for key, value in row["pruning_args"].items())
    limit = str(content["limit"]) if content.get("limit") not in (None, -1) else ""
    said = {"model": content["model"], "model_args": content["model_args"], "tasks": ",".join(row["tasks"])}
    said |= {"limit": limit, "pruning": row["pruning"], "pruning_args": pairs}
    return shlex.join(["lmms-eval", *(part for key, value in said.items() if value for part in (f"--{key}", value))])


def _checkpoint(arguments: str) -> str:
    pairs = dict(part.partition("=")[::2] for part in arguments.split(","))
    return pairs.get("pretrained") or pairs.get("model") or ""


def _median(record: Mapping[str, Any]) -> float | None:
    return record.get("latency", {}).get("ttft", {}).get("p50")


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


# -- one evaluation ---------------------------------------------------------------------------------------------------


def _evaluated(content: Mapping[str, Any], path: Path) -> Iterator[Entry]:
    """Every task of lmms-eval's own results file; nothing to compare with is in it."""
    record, config = content["pruning"], content.get("config", {})
    tokens = (record["visual_tokens"].get("mean_after", 0.0), record["visual_tokens"].get("mean_before", 0.0))
    common = {
        "method": " + ".join(one["name"] for one in record["strategies"]) or summary.name([]),
        "setting": summary.name(record["strategies"]) if record["strategies"] else "",
        "family": record.get("model", {}).get("family", ""),
        "model": content.get("model_name") or _checkpoint(str(config.get("model_args") or "")),
        "keep": _share(*tokens),
        "tokens": tokens,
        "kv": record.get("kv_cache_bytes", {}).get("ratio"),
        "flops": record.get("prefill_flops", {}).get("ratio"),
        "ttft": None,
        "record": path,
        "command": shlex.join(["lmms-eval", "--model", str(config.get("model", "")), "--tasks", *content["configs"]]),
    }
    for task, said in content["configs"].items():
        metrics = [metric["metric"] for metric in said.get("metric_list") or []]
        results = {key.partition(",")[0]: value for key, value in content["results"].get(task, {}).items()}
        value = next((results[name] for name in metrics if isinstance(results.get(name), (int, float))), None)
        if value is not None:
            questions = content["n-samples"][task]["effective"]
            nothing = {"low": None, "high": None, "change": None, "over": None, "layered": None}
            yield Entry(**common, task=task, questions=questions, accuracy=value, **nothing)


# -- the page ---------------------------------------------------------------------------------------------------------

COLUMNS = {
    "method": "",
    "kept": "visual tokens kept, in % of all",
    "accuracy": "in %, with a 95 % interval",
    "change": "from the unpruned model, in points",
    "over random": "from random tokens, as many in the last layer or the next fewer, in points",
    "at equal layers": "from random tokens, as many on average over the decoder layers, in points",
    "FLOPs": "of the prefill, relative to the unpruned model",
    "KV": "bytes of the cache, relative to the unpruned model",
    "TTFT": "time to first token, relative to the unpruned model",
    "task": "",
    "model": "checkpoint",
    "record": "",
}


def page(found: Sequence[Entry], target: Path) -> str:
    """The page to be written at `target`; links are relative to it."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    commands = list(dict.fromkeys(entry.command for entry in found))
    return environment.get_template("leaderboard.html.j2").render(
        version=__version__,
        columns=COLUMNS,
        rows=[_row(entry, target, commands.index(entry.command)) for entry in found],
        commands=commands,
        families=_sorted(entry.family for entry in found),
        models=_sorted(entry.model for entry in found),
        tasks=sorted({entry.task for entry in found}, key=lambda task: (task != MEAN, task)),
        budgets=sorted({_budget(entry) for entry in found}, reverse=True),
        records=len({entry.record for entry in found}),
    )


def _sorted(names: Any) -> list[str]:
    return sorted(set(filter(None, names)))


def _budget(entry: Entry) -> int:
    """In %, as it is filtered by."""
    return round(100 * (entry.keep or 0))


def _row(entry: Entry, target: Path, command: int) -> dict[str, Any]:
    after, before = entry.tokens
    link = Path(os.path.relpath(entry.record.resolve(), target.resolve().parent)).as_posix()
    cells = [
        (100 * (entry.keep or 0), f"{100 * (entry.keep or 0):.0f} %", f"{after:.0f} of {before:.0f}"),
        (entry.accuracy, f"{100 * entry.accuracy:.1f}", _ends(entry.low, entry.high)),
        _points(entry.change),
        _points(entry.over),
        _points(entry.layered),
        *((ratio, "-" if ratio is None else f"{ratio:.2f}x", "") for ratio in (entry.flops, entry.kv, entry.ttft)),
        (entry.task, entry.task, f"{entry.questions} questions"),
        (entry.model, entry.model, entry.family),
    ]
    return {
        "method": entry.method,
        "setting": entry.setting,
        "data": {"family": entry.family, "model": entry.model, "task": entry.task, "budget": _budget(entry)},
        "cells": [{"value": "" if v is None else v, "text": text, "small": small} for v, text, small in cells],
        "link": link,
        "command": command,
    }


def _ends(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{100 * low:.0f}\u2013{100 * high:.0f}"


def _points(estimate: Mapping[str, float] | None) -> tuple[float | None, str, str]:
    if estimate is None:
        return None, "", ""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return value, f"{value:+.1f}", f"{low:+.1f} \u2026 {high:+.1f}"
