"""Re-run a published claim: poster-l2, atp-efficiency, atp-robustness, vprune-main, vprune-design, hard-samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtp_plugin import files
from vtp_plugin.reporting.terminal import console


def command(
    name: Annotated[str, typer.Argument(help="The study.")],
    model: Annotated[str, typer.Option(help="lmms-eval's model, or a CLIP checkpoint for poster-l2.")] = "",
    model_args: Annotated[str, typer.Option("--model-args", help="lmms-eval's model_args.")] = "",
    tasks: Annotated[str, typer.Option(help="lmms-eval's tasks, separated by commas.")] = "",
    limit: Annotated[int, typer.Option(help="Samples per task; -1 for all, 0 for the study's own number.")] = 0,
    images: Annotated[str, typer.Option(help="poster-l2: a folder with one folder of pictures per class.")] = "",
    classes: Annotated[str, typer.Option(help="poster-l2: class names, or a file of 'FOLDER NAME' lines.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other setting of the YAML, key=value.")] = None,
    jobs: Annotated[int, typer.Option(help="lmms-eval processes side by side.")] = 1,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder; studies/NAME by default.")] = None,
) -> None:
    from vtp_plugin.errors import PruningError
    from vtp_plugin.studies.study import conduct

    said = {"model": model, "model_args": model_args, "tasks": tasks, "images": images, "classes": classes}
    said = {key: value for key, value in said.items() if value} | ({"limit": limit} if limit else {})
    for pair in set_ or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise PruningError(f"--set needs key=value, got '{pair}'")
        said[key] = files.parse_yaml(value)
    folder = files.check_folder(output or Path("studies") / name)
    record = conduct(name, said, folder, console(), jobs)
    console().print(f"record, tables and figures: {record.parent}")
