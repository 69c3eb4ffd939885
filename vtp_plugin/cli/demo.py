"""The main job on the embedded model: every strategy through lmms-eval, then one table and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtp_plugin import files
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.terminal import console

STRATEGIES = "atp,vprune,l2,fastv,visionzip,vtp,random"


def command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for results, table and picture.")] = Path(
        "demo-output"
    ),
    pruning: Annotated[str, typer.Option(help="Strategies, separated by commas; a+b composes.")] = STRATEGIES,
    keep_ratio: Annotated[float, typer.Option(help="Kept / all visual tokens, for all with a budget.")] = 0.25,
    limit: Annotated[int, typer.Option(help="Questions per task; -1 for all.")] = 100,
) -> None:
    if not 0 < keep_ratio <= 1:
        raise PruningError(f"--keep-ratio must be in (0, 1], got {keep_ratio}")
    from vtp_plugin import config
    from vtp_plugin.compare import matrix, sweep
    from vtp_plugin.plugins import get_strategy
    from vtp_plugin.reporting import comparison
    from vtp_plugin.reporting.figures import drawn
    from vtp_plugin.tiny.modeling import depth
    from vtp_plugin.tiny.store import load_weights

    out = console()
    comparison.check(files.check_folder(output))
    if output.is_dir():
        files.check_output(output / "kept.png")
    asked = config.parse_names(pruning, "--pruning")
    specs = matrix.cells(asked, [keep_ratio])
    if "fastv" in asked and "random" in asked:
        spent = get_strategy("fastv")().layer / depth(load_weights("llama"))  # these layers see all tokens
        specs.append(matrix.cell("random", spent + (1 - spent) * keep_ratio))  # which random has to be held against
    specs = matrix.numbered(matrix.unique(specs), matrix.SHARED)
    host = {"model": "llava", "model_args": "pretrained=vtp-tiny", "tasks": "vtp_scenes"}
    run = sweep.run(output, specs, **host, limit=limit, console=out)
    table = comparison.write(run, f"vtp-tiny, {_questions(limit)}, asked: keep_ratio={keep_ratio}")
    files.write(output / "kept.png", drawn(comparison.kept_picture(specs), ".png", 130))
    table.show(out)
    if (layered := comparison.layered(run)) is not None:
        layered.show(out)
    out.print(f"table and record: {output / 'table.md'}, {output / 'summary.json'}")
    out.print(f"what each strategy kept of three scenes: {output / 'kept.png'}")
    if run.failed_of(specs):
        raise typer.Exit(1)


def _questions(limit: int) -> str:
    return "all questions" if limit < 0 else f"{limit} questions per task"
