"""Check a strategy's promises: budget, determinism, precision, batches, parameters, cost. No model is needed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from vtp_plugin import modules, plugins
from vtp_plugin.conformance import conforms
from vtp_plugin.errors import unknown
from vtp_plugin.outcomes import Outcome
from vtp_plugin.reporting.terminal import console
from vtp_plugin.strategy import PruningStrategy


def command(
    name: Annotated[str, typer.Argument(help="A strategy.")],
    module: Annotated[Path | None, typer.Option(help="A Python file that defines it.")] = None,
) -> None:
    cls = plugins.get_strategy(name) if module is None else _defined(module, name)
    verdict(name, conforms(cls))


def verdict(name: str, outcomes: Iterable[Outcome]) -> None:
    """Print every check as it ends; the program ends with 1 if one failed."""
    out, failed = console(), 0
    for outcome in outcomes:
        failed += not outcome.passed
        sign = Text("ok    ", "green") if outcome.passed else Text("failed", "red")
        out.print(sign + f"  {outcome.name}" + (f": {outcome.remark}" if outcome.remark else ""))
    if failed:
        out.print(f"{name}: {failed} checks failed")
        raise typer.Exit(1)
    out.print(f"{name}: all checks passed")


def _defined(path: Path, name: str) -> type[PruningStrategy]:
    """The strategy of that name in a file."""
    found = {cls.name: cls for cls in vars(modules.load(path)).values() if _is_strategy(cls)}
    if name not in found:
        raise unknown("strategy", name, found, of=f" in {path}")
    return found[name]


def _is_strategy(value: Any) -> bool:
    return (
        inspect.isclass(value) and issubclass(value, PruningStrategy) and isinstance(getattr(value, "name", None), str)
    )
