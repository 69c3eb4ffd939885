"""Re-run a published claim; without a name, say which studies there are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtp_plugin import files
from vtp_plugin.reporting.terminal import console


def command(
    name: Annotated[str | None, typer.Argument(help="The study; `vtp study` lists them.")] = None,
    model: Annotated[str, typer.Option(help="lmms-eval's model, or a CLIP checkpoint for poster-l2.")] = "",
    model_args: Annotated[str, typer.Option("--model-args", help="lmms-eval's model_args.")] = "",
    tasks: Annotated[str, typer.Option(help="lmms-eval's tasks, separated by commas.")] = "",
    limit: Annotated[
        int | None, typer.Option(help="Samples per task; -1 for all. If not given, the study's own number.")
    ] = None,
    images: Annotated[str, typer.Option(help="poster-l2: a folder with one folder of pictures per class.")] = "",
    pictures: Annotated[
        str, typer.Option(help="vprune-design: a folder of photographs; scikit-image's if not given.")
    ] = "",
    classes: Annotated[str, typer.Option(help="poster-l2: class names, or a file of 'FOLDER NAME' lines.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other setting of the YAML, key=value.")] = None,
    jobs: Annotated[int, typer.Option(help="lmms-eval processes side by side.")] = 1,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder; studies/NAME by default.")] = None,
) -> None:
    from vtp_plugin.errors import Interrupted, PruningError
    from vtp_plugin.studies.study import conduct, listed

    if name is None:
        listed().show(console())
        return
    said = {"model": model, "model_args": model_args, "tasks": tasks, "images": images, "classes": classes}
    said = {key: value for key, value in (said | {"pictures": pictures}).items() if value}
    said |= {} if limit is None else {"limit": limit}
    for pair in set_ or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise PruningError(f"--set needs key=value, got '{pair}'")
        said[key] = files.parse_yaml(value)
    folder = files.check_folder(output or Path("studies") / name)
    try:
        record = conduct(name, said, folder, console(), jobs)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; what is finished is kept in {folder}: the same command goes on") from None
    console().print(f"record, tables and figures: {record.parent}")
