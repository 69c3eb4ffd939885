"""Run folders written by hand, without a host: what `vtp compare` leaves behind, in the smallest form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

TASK = "vtp_scenes_presence"
METRICS = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]


def write(
    folder: Path,
    cells: Mapping[str, Sequence[str]],
    targets: Sequence[str],
    *,
    kept: Mapping[str, int] | None = None,
    record: Mapping[str, Mapping[str, Any]] | None = None,
    task: str = TASK,
    model: str = "llava",
    checkpoint: str = "vtp-tiny",
) -> Path:
    """A folder whose cells gave these answers to one task; ids are `NAME`, `NAME-KEEP` (a ratio or tokens) or
    `NAME-KEEP-seedS`.

    `record`: entries of a cell's record that are not as usual.
    """
    (folder / "cells").mkdir(parents=True)
    entries = [entry(id) for id in cells]
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"model": model, "tasks": [task], "cells": entries}))
    for said, answers in zip(entries, cells.values(), strict=True):
        into = folder / "cells" / said["id"]
        into.mkdir()
        after = (kept or {}).get(said["id"], int(144 * (said["keep"] or 1)))
        lines = [line(i, a, t, after) for i, (a, t) in enumerate(zip(answers, targets, strict=True))]
        (into / f"samples_{task}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
        made = results(lines, after, task, model, checkpoint)
        made["pruning"] |= (record or {}).get(said["id"], {})
        (into / "results.json").write_text(json.dumps(made))
        ended = {"schema": 1, **said, "status": "done", "error": None, "command": ["lmms-eval"]}
        (into / "cell.json").write_text(json.dumps(ended))
    return folder


def entry(id: str) -> dict[str, Any]:
    name, *rest = id.split("-")
    seed = next((int(part.removeprefix("seed")) for part in rest if part.startswith("seed")), None)
    budget = next((float(part) for part in rest if not part.startswith("seed")), None)
    keep = budget if budget is None or budget <= 1 else None
    given = {"keep_ratio": keep, "keep_tokens": None if keep == budget else budget, "seed": seed}
    arguments = {key: value for key, value in given.items() if value is not None}
    label = "unpruned" if id == "none" else id
    return {"id": id, "label": label, "pruning": name, "pruning_args": arguments, "seed": seed, "keep": keep}


def line(number: int, answer: str, target: str, after: int) -> dict[str, Any]:
    report = {
        "images": [{"before": 144, "after": after}],
        "prompt_tokens": {"before": 200, "after": 56 + after, "mean_over_layers": 56 + after},
        "prefill_flops": {"before": 1000, "after": 100 + 900 * after // 144},
        "seconds": {"tower": 0.01, "prefill": 0.02, "decode": 0.01, "total": 0.04},
    }
    right = float(answer == target)
    return {
        "doc_id": number, "target": target, "filtered_resps": answer, "exact_match": right, "pruning": report,
        "input": f"question {number}",
    }  # fmt: skip


def results(lines: Sequence[Mapping[str, Any]], after: int, task: str, model: str, checkpoint: str) -> dict[str, Any]:
    mean = sum(each["exact_match"] for each in lines) / len(lines)
    flops = lines[0]["pruning"]["prefill_flops"]
    record = {
        "schema": 1,
        "strategies": [],
        "visual_tokens": {"mean_before": 144.0, "mean_after": float(after)},
        "samples": {"total": len(lines), "with_images": len(lines), "pruned": len(lines)},
        "seconds": {"tower": 1.0, "prefill": 2.0, "decode": 1.0, "total": 4.0, "selector": 0.0},
        "kv_cache_bytes": {"ratio": (56 + after) / 200},
        "prefill_flops": {**flops, "ratio": flops["after"] / flops["before"]},
    }
    return {
        "results": {task: {"alias": task, "exact_match,none": mean}},
        "configs": {task: {"metric_list": METRICS}},
        "n-samples": {task: {"original": len(lines), "effective": len(lines)}},
        "config": {"model": model},
        "model_name": checkpoint,
        "pruning": record,
    }
