"""lmms-eval's command line with `--pruning` and `--pruning_args`, for as long as it runs and nowhere else.

The host's module `lmms_eval.__main__` is being imported when it asks for plugins, or is imported later: its functions
are not there yet. So it is told how to hand them out: `cli_evaluate` and `parse_eval_args` run with a parser that knows
our options, and with flags folded into `model_args` before an evaluation begins. A pruned evaluation that failed makes
the program end with 1, where the host would end with 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

from vtp_plugin import contract, plugins
from vtp_plugin.errors import PruningError, reason
from vtp_plugin.hosts import compatibility
from vtp_plugin.hosts.lmms_eval import settings, status
from vtp_plugin.hosts.lmms_eval.contract import COMMAND_LINE

MODULE = "lmms_eval.__main__"
ENTRIES = ("cli_evaluate", "parse_eval_args")  # the functions of that module that others call
SINGLE = "cli_evaluate_single"  # called by cli_evaluate for every entry of a --config file


def extend() -> None:
    """Let the host's command line know our options, whether it is being imported now or will be."""
    if MODULE in sys.modules:
        sys.modules[MODULE].__class__ = CommandLine
    else:
        sys.meta_path.insert(0, Later())


class CommandLine(ModuleType):
    """The host's module, whose entries run with our options."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return wraps(value)(partial(_extended, self, value)) if name in ENTRIES else value


class Later(MetaPathFinder):
    """Extends the host's module when it is imported, and is gone by then."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        spec.loader.create_module = lambda spec: CommandLine(spec.name)
        return spec


def _extended(module: CommandLine, entry: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call an entry of the host with our parser and our folding in its module."""
    variables, failures = vars(module), []
    if isinstance(variables["argparse"], Argparse):  # one entry inside the other
        return entry(*args, **kwargs)
    own = {"argparse": Argparse(), SINGLE: wraps(variables[SINGLE])(partial(_single, variables[SINGLE], failures))}
    with _instead(variables, own):
        answer = entry(*args, **kwargs)
    if failures:
        sys.exit(1)
    return answer


@contextmanager
def _instead(variables: dict[str, Any], own: dict[str, Any]) -> Iterator[None]:
    hidden = {name: variables[name] for name in own}
    variables.update(own)
    try:
        yield
    finally:
        variables.update(hidden)


def _single(original: Callable, failures: list[str], args: argparse.Namespace) -> Any:
    """One evaluation of the command line: fold our options into model_args; tell how it begins and fails."""
    said, token = vars(args), status.cell.set(str(args.output_path or ""))
    status.say(status.STARTED)
    try:
        args.model_args = settings.folded(said[settings.CARRIER], said[settings.KEY], said[settings.ARGS])
        return original(args)
    except Exception as error:
        status.say(status.FAILED, error=reason(error))
        ours = isinstance(error, PruningError)
        if ours or f"{settings.KEY}=" in str(args.model_args):
            failures.append(reason(error))
        if not ours or args.verbosity == "DEBUG":
            raise
        print(f"lmms-eval: error: {error}", file=sys.stderr, flush=True)
        return None, None  # as where there are no results
    finally:
        status.cell.reset(token)


# -- the parser -------------------------------------------------------------------------------------------------------


class Argparse(SimpleNamespace):
    """The module `argparse` as the host's command line sees it: its parser knows our options."""

    def __getattr__(self, name: str) -> Any:
        return getattr(argparse, name)

    @property
    def ArgumentParser(self) -> type:
        return Parser


class Parser(argparse.ArgumentParser):
    """The evaluation's parser."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """Checks what the user said before anything is loaded."""
        if f"--{settings.KEY}" not in self._option_string_actions:
            _add_options(self)
        try:
            found, rest = super().parse_known_args(args, namespace)
            plugins.join(settings.modules(vars(found), found.config))
            for said in settings.every(vars(found), found.config):
                if settings.strategies_in(said) is not None:
                    settings.refuse_output(found.output_path or said.get("output_path"))
                    compatibility.refuse_broken(said.get("model", found.model))
                    contract.check(COMMAND_LINE)
        except PruningError as error:
            self.exit(2, f"{self.prog}: error: {error}\n")
        return found, rest


class Once(argparse.Action):
    """An option that is given once, or twice alike."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None)
        if before not in (None, values):
            raise PruningError(f"{option_string} is given twice with different values: {before} and {values}")
        setattr(namespace, self.dest, values)


class Names(Once):
    """`--pruning`; the catalogue, which other packages fill, is only looked at when its help is shown."""

    @property
    def help(self) -> str:
        return f"Strategies to prune visual tokens with: {', '.join(plugins.list_strategies())}, or none"

    @help.setter
    def help(self, value: Any) -> None:
        """Set by argparse."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("visual token pruning (vtp-plugin)")
    group.add_argument(f"--{settings.KEY}", action=Names, type=str, metavar="NAME[:SETTING][+NAME...]|FILE.yaml")
    group.add_argument(
        f"--{settings.ARGS}",
        f"--{settings.ARGS.replace('_', '-')}",
        action=Once,
        type=str,
        default=None,
        metavar="KEY=VALUE,...",
        help="Their hyper-parameters, e.g. keep_ratio=0.6,alpha=0.5; with several strategies fastv.layer=2",
    )
    group.add_argument(
        f"--{settings.MODULES}",
        f"--{settings.MODULES.replace('_', '-')}",
        action="append",
        metavar="FILE.py",
        help="A Python file with strategies or families of one's own; may be given several times",
    )
