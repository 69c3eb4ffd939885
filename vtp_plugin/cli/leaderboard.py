"""One static page of all records in folders: sortable, every number linked to its record and its command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtp_plugin import files
from vtp_plugin.reporting.terminal import console


def command(
    folders: Annotated[list[Path], typer.Argument(help="Folders with records, searched to their bottom, or records.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("leaderboard.html"),
) -> None:
    from vtp_plugin.reporting import leaderboard

    files.check_output(output, kinds=(".html", ".htm"))
    found = leaderboard.entries(folders)
    files.write(output, leaderboard.page(found, output))
    records = len({entry.record for entry in found})
    console().print(f"written: {output} ({len(found)} numbers from {records} records)")
