"""One self-contained HTML page from a run folder of `vtp compare`: table, accuracy against cost, gallery."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtp_plugin import files
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.terminal import console


def command(
    run_dir: Annotated[Path, typer.Argument(help="A folder that `vtp compare` wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The page to write; report.html in the run folder if not said."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Questions per task in the gallery; -1 for all recorded ones.")] = -1,
) -> None:
    from vtp_plugin.reporting import runs
    from vtp_plugin.reporting.report import page

    if samples < -1:
        raise PruningError(f"--samples must be -1 or a whole number >= 0, got {samples}")
    target = output or run_dir / "report.html"
    run = runs.load(run_dir)
    files.check_output(target, kinds=(".html", ".htm"))
    made = page(run, None if samples == -1 else samples)
    files.write(target, made)
    console().print(f"written: {target} ({len(made.encode()) / 1e6:.1f} MB)")
