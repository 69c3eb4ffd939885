"""The main job on the embedded model: every strategy through lmms-eval, then one table and one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vtp_plugin import config
from vtp_plugin.errors import PruningError

STRATEGIES = "atp,vprune,l2,fastv,visionzip,random"


def command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for results, table and picture.")] = Path(
        "demo-output"
    ),
    pruning: Annotated[str, typer.Option(help="Strategies, separated by commas; a+b composes.")] = STRATEGIES,
    keep_ratio: Annotated[float, typer.Option(help="Kept / all visual tokens, for all with a budget.")] = 0.25,
    limit: Annotated[int, typer.Option(help="Questions per task; -1 for all.")] = 100,
) -> None:
    specs = [spec.strip() for spec in pruning.split(",")]
    runs = {spec: _arguments(spec, keep_ratio) for spec in specs}
    from vtp_plugin.integrations import sweep
    from vtp_plugin.reporting import comparison

    console = Console(highlight=False)
    finished = sweep.run(output, {"none": {}, **runs}, model="llava", tasks="vtp_scenes", limit=limit, console=console)
    table = comparison.table(finished, title=f"vtp-tiny, {_questions(limit)}, asked: keep_ratio={keep_ratio}")
    (output / "table.md").write_text(table.markdown() + "\n")
    (output / "summary.json").write_text(json.dumps(comparison.summary(finished), indent=1) + "\n")
    picture = comparison.kept_picture(runs)
    picture.savefig(output / "kept.png", dpi=130)
    console.print(table.rich())
    console.print(f"table and record: {output / 'table.md'}, {output / 'summary.json'}")
    console.print(f"what each strategy kept of three scenes: {output / 'kept.png'}")


def _arguments(spec: str, keep_ratio: float) -> dict[str, float]:
    """keep_ratio for every strategy of the spec that has a budget; refuses what cannot be run."""
    strategies = config.resolve(spec)
    if not 0 < keep_ratio <= 1:
        raise PruningError(f"--keep-ratio must be in (0, 1], got {keep_ratio}")
    budgeted = [s.name for s in strategies if s.budgeted]
    return {"keep_ratio" if len(strategies) == 1 else f"{name}.keep_ratio": keep_ratio for name in budgeted}


def _questions(limit: int) -> str:
    return "all questions" if limit < 0 else f"{limit} questions per task"
