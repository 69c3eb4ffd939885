"""The strategies, one of them with its settings, or with --models the model families and their stages."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from vtp_plugin import plugins, settings
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.vllm.contract import FAMILIES as SERVED
from vtp_plugin.reporting.tables import Table
from vtp_plugin.reporting.terminal import console
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import BUDGET, PruningStrategy

COMMON = ("invert", "budget", "positions")


def command(
    name: Annotated[str, typer.Argument(help="A strategy: its parameters and the papers' settings.")] = "",
    models: Annotated[bool, typer.Option("--models", help="Model families instead of strategies.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
) -> None:
    if name and models:
        raise PruningError(f"say a strategy or --models, not both, got '{name}'")
    if name:
        return _shown(plugins.get_strategy(name), console())
    table = families() if models else catalogue()
    console().print(table.markdown()) if markdown else table.show(console())
    return None


def catalogue() -> Table:
    """Every strategy with its stage, fields and source."""
    table = Table(["name", "stage", "what it keeps", "parameters (defaults)", "source"])
    for name, cls in plugins.strategies().items():
        strategy = cls()
        table.add(name, strategy.stage.value, _first_sentence(cls), _fields(strategy.config()), cls.paper)
    return table


def families(vllm: bool = True) -> Table:
    """Model family x stage, a note says why there is no such stage; and, if `vllm`, those that are served inside it."""
    table = Table(["family", "models", *(stage.value for stage in Stage), *["inside vLLM"] * vllm])
    inside = {one.adapter: ", ".join(stage.value for stage in one.stages) for one in SERVED.values()}
    for cls in plugins.adapters():
        cells = (_cell(table, cls.stages[stage]) for stage in Stage)
        table.add(cls.family, cls.models, *cells, *[inside.get(cls.family, "no")] * vllm)
    return table


def _cell(table: Table, reason: str) -> str:
    return table.noted("no", reason) if reason else "yes"


def _shown(cls: type[PruningStrategy], out: Console) -> None:
    """One strategy: what it does, its source, every parameter, every setting that comes with the package."""
    strategy = cls()
    out.print(f"{cls.name} ({strategy.stage.value} stage): {_first_sentence(cls)}", soft_wrap=False)
    out.print(f"source: {cls.paper}")
    parameters = ", ".join(f"{field}={value}" for field, value in strategy.config().items())
    out.print(f"parameters (defaults): {parameters}", soft_wrap=False)
    found = settings.of(cls.name)
    out.print("settings, for --pruning:" if found else "no settings come with it")
    for setting in found:
        out.print(f"  {cls.name}:{setting.name}  {_fields(setting.fields)}".rstrip())
        out.print(Padding(Text(setting.source), (0, 0, 0, 6)), soft_wrap=False)


def _first_sentence(cls: type[PruningStrategy]) -> str:
    return (inspect.getdoc(cls) or "").split("\n")[0]


def _fields(config: dict[str, object]) -> str:
    """The fields and their values, without those that every strategy with a budget has."""
    shown = {k: v for k, v in config.items() if k not in COMMON and (v is not None or k not in BUDGET)}
    return ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())
