"""Several configurations through the real lmms-eval command line, in one process, with a progress bar."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vtp_plugin.errors import PruningError

STARTING = re.compile(r"Evaluation tracker args: .*'output_path': '([^']+)'")
ANSWERING = re.compile(r"Model Responding:.*?(\d+)/(\d+)")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def run(
    folder: Path,
    runs: Mapping[str, Mapping[str, Any]],
    *,
    model: str,
    tasks: str,
    limit: int,
    console: Console,
    pretrained: str = "vtp-tiny",
) -> dict[str, dict[str, Any]]:
    """Evaluate every run (strategies -> hyper-parameters); the results file of each. PruningError if one failed."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        {
            "model": model,
            "model_args": f"pretrained={pretrained}",
            "tasks": tasks,
            "limit": limit,
            "pruning": spec,
            **({"pruning_args": dict(fields)} if fields else {}),
            "output_path": str(folder / "runs" / spec),
            "log_samples": True,
        }
        for spec, fields in runs.items()
    ]
    written = folder / "runs.yaml"
    written.write_text(yaml.safe_dump(entries, sort_keys=False))
    log = folder / "lmms-eval.log"
    before = {spec: set(_results(folder, spec)) for spec in runs}
    _watch([sys.executable, "-m", "lmms_eval", "--config", str(written)], log, console)
    found = {spec: sorted(set(_results(folder, spec)) - before[spec]) for spec in runs}
    missing = [spec for spec, files in found.items() if not files]
    if missing:
        raise PruningError(f"no results for {', '.join(missing)}; the reason is in {log}")
    return {spec: json.loads(files[-1].read_text()) for spec, files in found.items()}


def _results(folder: Path, spec: str) -> list[Path]:
    return list((folder / "runs" / spec).rglob("*_results.json"))


def _watch(command: list[str], log: Path, console: Console) -> None:
    """Run the command, its output to a log file, its answered questions to a progress bar."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console.print(f"running: {' '.join(['lmms-eval', *command[3:]])}   log: {log}", soft_wrap=True)
    environment = {**os.environ, **OFFLINE, "PYTHONUNBUFFERED": "1"}
    with Progress(*columns, console=console) as progress, log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        )
        bar = progress.add_task("loading", total=None)
        for line in process.stdout:  # a progress bar's carriage return ends a line, too
            file.write(line)
            if match := STARTING.search(line):
                progress.update(bar, visible=progress.tasks[bar].completed > 0)
                bar = progress.add_task(Path(match[1]).name, total=None)
            elif match := ANSWERING.search(line):
                progress.update(bar, completed=int(match[1]), total=int(match[2]))
        process.wait()
