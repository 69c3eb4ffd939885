"""Check a strategy's promises: budget, determinism, precision, batches, parameters, cost. No model is needed."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console

from vtp_plugin import plugins
from vtp_plugin.conformance import conforms
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.strategy import PruningStrategy


def command(
    name: Annotated[str, typer.Argument(help="A strategy.")],
    module: Annotated[Path | None, typer.Option(help="A Python file that defines it.")] = None,
) -> None:
    cls = plugins.get_strategy(name) if module is None else _defined(module, name)
    console, failed = Console(highlight=False, soft_wrap=True), 0
    for outcome in conforms(cls):
        failed += not outcome.passed
        sign = "[green]ok[/]    " if outcome.passed else "[red]failed[/]"
        console.print(f"{sign}  {outcome.name}" + (f": {outcome.remark}" if outcome.remark else ""))
    if failed:
        console.print(f"{name}: {failed} checks failed")
        raise typer.Exit(1)
    console.print(f"{name}: all checks passed")


def _defined(path: Path, name: str) -> type[PruningStrategy]:
    """The strategy of that name in a file."""
    found = {cls.name: cls for cls in vars(_loaded(path)).values() if _is_strategy(cls)}
    if name not in found:
        raise unknown("strategy", name, found, of=f" in {path}")
    return found[name]


def _loaded(path: Path) -> ModuleType:
    if not path.is_file():
        raise PruningError(f"file not found: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise PruningError(f"not a Python file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PruningError(f"{path} cannot be imported: {type(error).__name__}: {error}") from None
    return module


def _is_strategy(value: Any) -> bool:
    return (
        inspect.isclass(value) and issubclass(value, PruningStrategy) and isinstance(getattr(value, "name", None), str)
    )
