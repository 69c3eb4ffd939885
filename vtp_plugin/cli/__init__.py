"""The `vtp` program. One file per command; a new file here is found by itself."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pkgutil import iter_modules

import typer
from rich.console import Console

from vtp_plugin.errors import PruningError
from vtp_plugin.hookspecs import hookimpl

app = typer.Typer(
    name="vtp",
    help="Visual token pruning: look at it, check it, calibrate it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _program() -> None:
    """Keeps `vtp COMMAND` as it is, however many commands there are."""


@hookimpl
def vtp_register_commands(cli: typer.Typer) -> None:
    for info in iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        cli.command(name=info.name.replace("_", "-"), help=module.__doc__)(module.command)


def main() -> None:
    """Run the program; what a user can put right is one sentence on stderr and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from vtp_plugin import plugins

    try:
        plugins.manager().register(sys.modules[__name__], name=__name__)
        plugins.each("vtp_register_commands", cli=app)
        app()
    except PruningError as error:
        Console(stderr=True).print(f"[red]vtp: error:[/] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
