"""The strategies, or with --models the model families and their stages."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer
from rich.console import Console

from vtp_plugin import plugins
from vtp_plugin.reporting.tables import Table
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import BUDGET, PruningStrategy

COMMON = ("invert", "budget", "positions")


def command(
    models: Annotated[bool, typer.Option("--models", help="Model families instead of strategies.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
) -> None:
    table = families() if models else catalogue()
    print(table.markdown()) if markdown else Console().print(table.rich())


def catalogue() -> Table:
    """Every strategy with its stage, fields and source."""
    table = Table(["name", "stage", "what it keeps", "parameters (defaults)", "source"])
    for name, cls in plugins.strategies().items():
        strategy = cls()
        table.add(name, strategy.stage.value, _first_sentence(cls), _fields(strategy), cls.paper)
    return table


def families() -> Table:
    """Model family x stage; an empty cell says why."""
    table = Table(["family", "models", *(stage.value for stage in Stage)])
    for cls in plugins.adapters():
        table.add(cls.family, cls.models, *(cls.stages[stage] or "yes" for stage in Stage))
    return table


def _first_sentence(cls: type[PruningStrategy]) -> str:
    return inspect.getdoc(cls).split("\n")[0]


def _fields(strategy: PruningStrategy) -> str:
    """The fields and their defaults, without those that every strategy with a budget has."""
    shown = {k: v for k, v in strategy.config().items() if k not in COMMON and (v is not None or k not in BUDGET)}
    return ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())
