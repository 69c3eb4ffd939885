"""Throughput of a vLLM server at several concurrencies, pruned and unpruned."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vtp_plugin import config, files
from vtp_plugin.errors import Failed, PruningError
from vtp_plugin.reporting.terminal import console

CACHE = 2**28  # bytes, of the embedded model's server


def command(
    model: Annotated[str, typer.Option(help="What vLLM serves: vtp-tiny, a folder or a name on the hub.")] = "vtp-tiny",
    pruning: Annotated[str, typer.Option(help="Strategies, separated by commas; each at every ratio.")] = "visionzip",
    keep: Annotated[str, typer.Option(help="Keep ratios, separated by commas.")] = "0.5,0.25,0.1",
    concurrency: Annotated[str, typer.Option(help="Requests at a time, separated by commas.")] = "1,4,16",
    requests: Annotated[int, typer.Option(help="Requests per concurrency.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens per answer.")] = 16,
    side: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 336,
    options: Annotated[str, typer.Option(help="More options of `vllm serve`, as on its command line.")] = "",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the numbers to this JSON, server by server.")
    ] = None,
) -> None:
    from vtp_plugin.hosts.vllm.plan import strategies_of
    from vtp_plugin.hosts.vllm.throughput import Load, measure

    ratios = config.parse_numbers(keep, float, "--keep")
    load = Load(config.parse_numbers(concurrency, int, "--concurrency"), requests, tokens, side)
    names = config.parse_names(pruning, "--pruning")
    runs: list[dict[str, Any] | None] = [None]
    runs += [{"strategy": name, "keep_ratio": ratio} for name in names for ratio in ratios]
    for settings in filter(None, runs):
        strategies_of(settings)
    _check(load)
    if output is not None:
        files.check_output(output)
    path, extra = _served(model)
    out, lines = console(), []
    with _logs() as folder, _shown(lines, out):
        for number, settings in enumerate(runs):
            out.print(f"serving {model} with {settings or 'no pruning'}")
            lines += measure(path, settings, [*extra, *shlex.split(options)], load, folder / f"{number}.log")
            if output is not None:
                files.write_json(output, _record(model, options, load, lines))


@contextmanager
def _shown(lines: list[dict[str, Any]], out: Console) -> Iterator[None]:
    """Show at the end what was measured, also where a later server failed or nobody waits for it."""
    try:
        yield
    finally:
        if lines:
            _table(lines).show(out)


@contextmanager
def _logs() -> Iterator[Path]:
    """A folder for the servers' logs, which is left where one failed: its message names the log."""
    folder, kept = Path(tempfile.mkdtemp(prefix="vtp-serve-bench-")), False
    try:
        yield folder
    except Failed:
        kept = True
        raise
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def _check(load: Any) -> None:
    """Refuse numbers that measure nothing."""
    for option, value in {
        "--concurrency": min(load.concurrencies),
        "--requests": load.requests,
        "--tokens": load.tokens,
        "--side": load.side,
    }.items():
        if value < 1:
            raise PruningError(f"{option} must be at least 1, got {value}")


def _served(model: str) -> tuple[str, list[str]]:
    """What vLLM is told to serve, and the options that the embedded model needs.

    Its cache is small: by default one wants nearly all of a CPU's memory, and does not start beside another program.
    """
    if model != "vtp-tiny":
        return model, []
    from vtp_plugin.tiny.checkpoint import resolve

    small = ["--max-model-len", "640", "--kv-cache-memory-bytes", str(CACHE)]
    return str(resolve(model, "hf")), ["--dtype", "float32", *small, "--enforce-eager"]


def _table(lines: list[dict[str, Any]]) -> Any:
    from vtp_plugin.reporting.tables import Table

    table = Table(("pruning", "at once", "prompt tokens", "requests/s", "against none", "first token", "end"))
    base = {line["concurrency"]: line["requests_per_second"] for line in lines if line["pruning"] is None}
    for line in lines:
        settings, rate = line["pruning"], line["requests_per_second"]
        table.add(
            f"{settings['strategy']} {settings['keep_ratio']:g}" if settings else "none",
            line["concurrency"],
            f"{line['prompt_tokens']:.0f}",
            f"{rate:.2f}",
            f"{rate / base[line['concurrency']]:.2f}x",
            f"{line['first_token_seconds'] * 1e3:.0f} ms",
            f"{line['end_seconds'] * 1e3:.0f} ms",
        )
    return table


def _record(model: str, options: str, load: Any, lines: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    from vtp_plugin.reporting.record import versions

    cuda = torch.cuda.is_available()
    return {
        "command": shlex.join(["vtp", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "model": model,
        "options": options,
        "requests": load.requests,
        "tokens": load.tokens,
        "side": load.side,
        "versions": versions(),
        "lines": lines,
    }
