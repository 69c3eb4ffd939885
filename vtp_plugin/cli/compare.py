"""Compare strategies under lmms-eval: every configuration and the unpruned model, then a table with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtp_plugin import files
from vtp_plugin.reporting.terminal import console


def command(
    file: Annotated[
        Path | None, typer.Argument(help="A sweep file; options given beside it replace its fields.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder; one that exists is resumed.")] = ...,
    model: Annotated[str | None, typer.Option(help="lmms-eval's model, e.g. llava.")] = None,
    model_args: Annotated[str | None, typer.Option("--model-args", help="Its arguments.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lmms-eval's tasks, separated by commas.")] = None,
    pruning: Annotated[str | None, typer.Option(help="Strategies, separated by commas; a+b composes.")] = None,
    keep: Annotated[str | None, typer.Option(help="Keep ratios, separated by commas, for all with a budget.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of every strategy with a random seed.")] = None,
    positions: Annotated[
        str | None,
        typer.Option(help="Of kept tokens, in all cells: original, compact, own (each method's), shared (default)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per task; all if not given.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="lmms-eval's.")] = None,
    launch: Annotated[
        str | None, typer.Option(help='What starts lmms-eval, e.g. "accelerate launch --num_processes 4".')
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes that share the cells.")] = None,
    gallery: Annotated[
        bool | None, typer.Option("--gallery/--no-gallery", help="Keep pictures for vtp report.")
    ] = None,
    versus: Annotated[str | None, typer.Option(help="A method to hold against every other one, in pairs.")] = None,
) -> None:
    from vtp_plugin.compare import beside, sweep, sweepfile
    from vtp_plugin.errors import unknown
    from vtp_plugin.reporting import comparison, verdicts

    given = {"model": model, "model_args": model_args, "tasks": tasks, "pruning": pruning, "keep": keep}
    given |= {"seeds": seeds, "positions": positions, "limit": limit}
    given |= {"launch": launch, "jobs": jobs, "gallery": gallery}
    said = {"gallery": True, **(sweepfile.read(file) if file else {})} | _present(given)
    if batch_size is not None:
        said["options"] = {**(said.get("options") or {}), "batch_size": batch_size}
    cells, host = sweepfile.planned(said)
    if versus is not None and versus not in (names := {cell.pruning for cell in cells if cell.keep is not None}):
        raise unknown("method with a budget in this run", versus, names)
    comparison.check(files.check_folder(output))
    out = console()
    run = sweep.run(output, cells, **host, console=out)
    comparison.write(run, notes=beside.lines(run)).show(out)
    if (layered := comparison.layered(run)) is not None:
        layered.show(out)
    if versus is not None:
        table = verdicts.versus(run, versus)
        files.write(output / f"versus-{versus}.md", table.markdown() + "\n")
        table.show(out)
    out.print(f"{output}: table.md, table.csv, table.tex, summary.json; pictures: vtp report {output}")
    if run.failed_of(cells):
        raise typer.Exit(1)


def _present(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}
