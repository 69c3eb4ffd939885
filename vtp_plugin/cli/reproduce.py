"""Run rows of papers' tables again, with the unpruned model, and say what agrees: llava-1.5-7b, llava-next-7b, ..."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from vtp_plugin import config
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.tables import Table
from vtp_plugin.reporting.terminal import console


def command(
    model: Annotated[str, typer.Argument(help="A published table's name, or a YAML file of that form.")] = "",
    pruning: Annotated[str, typer.Option(help="Methods, separated by commas; all if not given.")] = "",
    tokens: Annotated[str, typer.Option(help="Budgets as the tables print them, separated by commas.")] = "",
    tasks: Annotated[str, typer.Option(help="The tables' tasks, separated by commas.")] = "",
    source: Annotated[str, typer.Option(help="Only these tables, separated by commas.")] = "",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run folder; one that exists is resumed.")
    ] = None,
    model_args: Annotated[str, typer.Option("--model-args", help="Other arguments of the model.")] = "",
    limit: Annotated[int, typer.Option(help="Questions per task; -1 for all, as the papers.")] = -1,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="lmms-eval's.")] = None,
    launch: Annotated[str, typer.Option(help='What starts lmms-eval, e.g. "accelerate launch".')] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and run nothing.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="What is published, and nothing more.")] = False,
) -> None:
    from vtp_plugin.compare import published, reproduce, sweep

    if list_ or not model:
        overview(model).show(console())
        return
    tables = published.read(model)
    said = {"--pruning": pruning, "--tokens": tokens, "--tasks": tasks, "--source": source}
    asked = {option: config.parse_names(text, option) if text else [] for option, text in said.items()}
    rows = published.chosen(tables, *asked.values())
    names = reproduce.tasks(tables, rows, asked["--tasks"])
    specs = reproduce.cells(tables, rows)
    host = {"model": tables.host.model, "model_args": model_args or tables.host.model_args, "limit": limit}
    host |= {"tasks": reproduce.hosted(tables, names), "options": {"batch_size": batch_size} if batch_size else {}}
    folder = output or Path("out") / f"reproduce-{Path(model).name.removesuffix('.yaml')}"
    if dry_run:
        for line in reproduce.commands(specs, host, folder, launch):
            console().print(shlex.join(line))
        return
    if len(specs) < 2:
        raise PruningError(f"nothing to run: {tables.why_not(rows[0])}")
    reproduce.check(folder)
    run = sweep.run(folder, specs, **host, launch=launch, console=console())
    made = reproduce.table(tables, rows, names, run)
    reproduce.write(made, folder)
    made.show(console())
    console().print(f"{folder}: reproduced.md, reproduced.csv; pictures and times: vtp report {folder}")
    if run.failed_of(specs):
        raise typer.Exit(1)


def overview(model: str = "") -> Table:
    """What there is: per model, or per method and budget of one model."""
    from vtp_plugin.compare import published

    if not model:
        table = Table(["model", "methods", "tokens", "tasks"])
        for name in published.names():
            rows = published.read(name).rows
            tasks = [task for row in rows for task in row.numbers]
            found = ([row.method for row in rows], [row.budget for row in rows], tasks)
            table.add(name, *(" ".join(dict.fromkeys(each)) for each in found))
        return table
    tables = published.read(model)
    table = Table(["method", "tokens", "source", "run as", "numbers"])
    for row in tables.rows:
        setting = tables.setting(row)
        said = tables.why_not(row) if setting is None else _said(setting.pruning, setting.pruning_args)
        table.add(row.method, row.budget, row.source, said, " ".join(f"{k} {v:g}" for k, v in row.numbers.items()))
    return table


def _said(pruning: str, arguments: dict[str, object]) -> str:
    return " ".join([pruning, *(f"{key}={value}" for key, value in arguments.items())])
