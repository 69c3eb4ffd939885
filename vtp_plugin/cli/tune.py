"""Find the smallest keep ratio whose accuracy stays within a given drop, by a paired bootstrap interval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtp_plugin import config, files, locks
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.terminal import console


def command(
    max_drop: Annotated[str, typer.Option("--max-drop", help="Of the tasks' mean accuracy: 1% or 0.01.")] = ...,
    pruning: Annotated[str, typer.Option(help="Strategies, each tuned by itself, separated by commas.")] = ...,
    tasks: Annotated[str, typer.Option(help="lmms-eval's tasks, separated by commas.")] = ...,
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder; one that exists is resumed.")] = ...,
    model: Annotated[str, typer.Option(help="lmms-eval's model, e.g. llava.")] = "llava",
    model_args: Annotated[str, typer.Option("--model-args", help="Its arguments.")] = "pretrained=vtp-tiny",
    step: Annotated[float, typer.Option(help="Distance of the keep ratios that are tried.")] = 0.05,
    limit: Annotated[int, typer.Option(help="Questions per task; -1 for all.")] = -1,
    launch: Annotated[str, typer.Option(help='What starts lmms-eval, e.g. "accelerate launch".')] = "",
) -> None:
    from vtp_plugin.compare import matrix, sweep, tuning
    from vtp_plugin.reporting import comparison

    drop, grid = _share(max_drop), tuning.grid(step)
    specs, names = config.parse_names(pruning, "--pruning"), config.parse_names(tasks, "--tasks")
    host = {"model": model, "model_args": model_args, "tasks": names, "limit": limit, "launch": launch}
    out = console()
    for spec in specs:
        tuning.check(spec)
    comparison.check(files.check_folder(output))
    with locks.folder(output):
        found = [tuning.tune(output, spec, grid, drop, console=out, **host) for spec in specs]
        comparison.write(sweep.run(output, [matrix.UNPRUNED], **host)).show(out)
    for tuned in found:
        out.print(tuned.sentence())
    if not all(tuned.keep for tuned in found):
        raise typer.Exit(1)


def _share(text: str) -> float:
    """1% or 0.01 as a number."""
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise PruningError(f"--max-drop must be a share such as 1% or 0.01, got '{text}'")
    return value
