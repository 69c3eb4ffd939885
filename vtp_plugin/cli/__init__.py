"""The `vtp` program. One file per command; a new file here is found by itself."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated, Any, get_type_hints

import typer

from vtp_plugin.errors import Failed, Interrupted, PruningError, one_line, sentence
from vtp_plugin.hookspecs import hookimpl
from vtp_plugin.reporting.terminal import console
from vtp_plugin.version import __version__

REFUSED, FAILED, STOPPED = 2, 1, 130  # exit codes: bad input, something failed, Ctrl-C
Modules = Annotated[
    list[Path] | None, typer.Option("--module", help="A Python file with strategies or families of one's own.")
]


def _hyphened(name: str) -> str:
    """An option as it is known here: --model_args is how the host spells it."""
    return name.replace("_", "-")


app = typer.Typer(
    name="vtp",
    help="Visual token pruning: look at it, check it, calibrate it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": _hyphened, "help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        console().print(f"vtp-plugin {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Keeps `vtp COMMAND` as it is, however many commands there are."""


@hookimpl
def vtp_register_commands(cli: typer.Typer) -> None:
    for info in iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        cli.command(name=info.name.replace("_", "-"), help=module.__doc__)(with_modules(module.command))


def with_modules(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the option --module, whose files join the catalogues before the command runs."""
    from vtp_plugin import plugins

    signature = inspect.signature(command)
    if "module" in signature.parameters:
        return command

    @wraps(command)
    def run(*given: object, module: list[Path] | None = None, **named: object) -> None:
        plugins.join(module or [])
        command(*given, **named)

    hints = get_type_hints(command, include_extras=True)
    own = [part.replace(annotation=hints[name]) for name, part in signature.parameters.items()]
    added = inspect.Parameter("module", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Modules)
    run.__signature__ = signature.replace(parameters=[*own, added])
    run.__annotations__ = {**hints, "module": Modules}
    return run


def main() -> None:
    """Run the program and end the process. To be ended, or to lose the terminal, is a Ctrl-C: what was started ends."""
    for name in ("SIGTERM", "SIGHUP"):
        if (sign := getattr(signal, name, None)) and signal.getsignal(sign) is signal.SIG_DFL:
            signal.signal(sign, signal.default_int_handler)
    raise SystemExit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """One command line; its exit code. The one place where errors end: as one sentence on stderr."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is no error
    try:
        _refuse_empty(arguments)
        _refuse_twice(arguments)
        ended = _commands()(args=[*arguments], prog_name="vtp", standalone_mode=False)
    except SystemExit as error:
        ended = error.code if isinstance(error.code, int) else FAILED
    except (Exception, KeyboardInterrupt) as error:
        return _misused(error) if hasattr(error, "format_message") else _failed(error)
    if ended == STOPPED:  # typer's own way with Ctrl-C, without a word
        return _failed(Interrupted("stopped"))
    return ended if isinstance(ended, int) else 0


def _misused(error: Any) -> int:
    """What the parser says of an option or an argument, as one sentence; the help where there was none at all."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        said = one_line(error.format_message()).rstrip(".")
        console(stderr=True).print(f"vtp: error: {said}")
    return error.exit_code


def _commands() -> typer.Typer:
    from vtp_plugin import plugins

    pm, this = plugins.manager(), sys.modules[__name__]
    if not pm.is_registered(this):
        pm.register(this, name=__name__)
        plugins.each("vtp_register_commands", cli=app)
    return app


def _refuse_empty(arguments: Sequence[str]) -> None:
    """PruningError for an option or an argument without text: an unset variable of the shell is no wish."""
    for before, part in pairwise(["", *arguments]):
        name, equals, value = part.partition("=") if part.startswith("-") else (before, "=", part)
        if equals and not value.strip():
            said = name if name.startswith("-") else "an argument"
            raise PruningError(f"{said} is empty: give it a value, or leave it out")


def _refuse_twice(arguments: Sequence[str]) -> None:
    """PruningError for an option that is given twice with different values, of which the last would win."""
    command = getattr(typer.main.get_command(_commands()), "commands", {}).get(next(iter(arguments), ""))
    for option in getattr(command, "params", ()):
        if option.param_type_name != "option" or option.multiple or option.is_flag:
            continue
        given = _given(arguments[1:], option.opts)
        if len(set(given)) > 1:
            name = max(option.opts, key=len)
            raise PruningError(f"{name} is given twice with different values: {given[0]} and {given[-1]}")


def _given(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """The values of an option, as often as it stands there, in either spelling."""
    pairs = [(part.partition("="), behind) for part, behind in pairwise([*arguments, ""])]
    return [value if equals else behind for (name, equals, value), behind in pairs if _hyphened(name) in names]


def _failed(error: BaseException) -> int:
    """Say what happened; where, too, if VTP_TRACEBACK is set."""
    if os.environ.get("VTP_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted("stopped")
    console(stderr=True).print(f"vtp: error: {sentence(error)}")
    if isinstance(error, Interrupted):
        return STOPPED
    return REFUSED if isinstance(error, PruningError) and not isinstance(error, Failed) else FAILED
