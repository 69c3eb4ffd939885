"""Time to first token with random weights in a real shape: pruned against unpruned and against the ideal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from vtp_plugin import config, files, locks, plugins
from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.reporting.terminal import console

DTYPES = ("float32", "bfloat16", "float16")
KERNELS = ("eager", "sdpa", "flash_attention_2")


def command(
    shape: Annotated[str, typer.Option(help="A model's shape, e.g. llava-1.5-7b or clip-vit-l-14.")] = "llava-1.5-7b",
    layers: Annotated[int, typer.Option(help="Decoder layers; 0 for the shape's own.")] = 0,
    pruning: Annotated[str, typer.Option(help="Strategies, separated by commas.")] = "",
    pruning_args: Annotated[str, typer.Option(help="Their hyper-parameters, e.g. fastv.layer=3.")] = "",
    keep: Annotated[str, typer.Option(help="Keep ratios, separated by commas.")] = "0.5,0.25",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas; 1, with --selectors 1,16.")] = "",
    repeats: Annotated[int, typer.Option(help="Timed rounds; medians are reported.")] = 5,
    selectors: Annotated[bool, typer.Option(help="Time what the strategies themselves compute instead.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda; chosen by itself.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; chosen by itself.")] = "",
    attention: Annotated[str, typer.Option(help="eager, sdpa or flash_attention_2.")] = "sdpa",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write JSON here row by row, a table beside it.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure rows anew that the file has already.")] = False,
) -> None:
    from vtp_plugin.bench import rounds as bench
    from vtp_plugin.bench.journal import Journal
    from vtp_plugin.hosts.transformers import shapes

    sizes, ratios = shapes.shape_of(shape), config.parse_numbers(keep, float, "--keep")
    names = config.parse_names(pruning or _usual(selectors, sizes.decodes), "--pruning")
    chosen = _strategies(names, ratios, config.parse_pairs(pruning_args))
    batches = config.parse_numbers(batch or ("1,16" if selectors else "1"), int, "--batch")
    bench.check(sizes, layers, batches, repeats)
    where, precision = _place(device, dtype, attention)
    if output is not None:
        files.check_output(output, kinds=(".json",))
        files.check_output(output.with_suffix(".md"))
        if output.with_suffix(".md").exists() and not (output.exists() or again):
            beside = f"{output.with_suffix('.md')}, which the table would replace, is there without {output}"
            raise PruningError(f"{beside}: name another file, or say --again")
    facts = {"shape": shape, "layers": layers, "attention": attention, "dtype": precision, "repeats": repeats}
    if not selectors:
        bench.refuse(chosen, sizes)
    with nullcontext() if output is None else locks.file(output):
        journal = Journal(output, facts, where, again)
        if selectors:
            table = _selectors(journal, chosen, layers, batches, repeats, where, precision)
        else:
            table = _timings(journal, sizes, chosen, batches, where)
        table.show(console())
        if output is not None:
            files.write(output.with_suffix(".md"), table.markdown() + "\n")


def _timings(journal: Any, sizes: Any, chosen: list[Any], batches: list[int], where: Any) -> Any:
    """Build the model, say how long it takes, and time what is missing."""
    from vtp_plugin.bench import rounds, tables
    from vtp_plugin.bench.journal import duration, say

    facts, model = journal.head, None
    items = rounds.items(sizes, lambda: model, chosen, batches, facts["repeats"])
    missing = [item for item in items if journal.row(item.key) is None]
    if missing:
        model = rounds.built(sizes, facts, where)
        seconds = len(missing) / len(items) * rounds.estimated(sizes, model, chosen, batches, facts["repeats"])
        say(f"{len(missing)} rows to measure, about {duration(seconds)}")
    title = facts["shape"] + (f", {facts['layers']} layers" if facts["layers"] else "")
    made = tables.timings if sizes.decodes else tables.encoders
    return _filled(journal, items, lambda rows: made(rows, title))


def _selectors(
    journal: Any, chosen: list[Any], layers: int, batches: list[int], repeats: int, where: Any, dtype: str
) -> Any:
    """Time the strategies on synthetic signals."""
    import torch

    from vtp_plugin.bench import selectors, tables

    timed = layers or 1
    items = selectors.measurable(
        chosen, selectors.TOKENS, batches, layers=timed, repeats=repeats, device=where, dtype=getattr(torch, dtype)
    )
    title = f"selection beside the prefill of a LLaVA-1.5-7B ({timed} of 32 decoder layers timed, scaled)"
    return _filled(journal, items, lambda rows: tables.selectors(rows, title))


def _filled(journal: Any, items: list[Any], made: Callable[[list[Any]], Any]) -> Any:
    """The table of all rows; where measuring ends before, that of what there is by then is shown on the way out."""
    try:
        return made(journal.fill(items))
    except BaseException:
        if rows := [row for item in items if (row := journal.row(item.key)) is not None]:
            made(rows).show(console())
        raise


def _usual(selectors: bool, decodes: bool) -> str:
    if selectors:
        return ",".join(plugins.list_strategies())
    return "l2,visionzip,fastv,random,stride" if decodes else "l2"


def _place(device: str, dtype: str, attention: str) -> tuple[Any, str]:
    """The device, and the precision that is usual on it."""
    import torch

    if attention not in KERNELS:
        raise unknown("attention", attention, KERNELS)
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise unknown("device", device, ("cpu", "cuda")) from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise PruningError("--device cuda: there is no CUDA device")
    precision = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    if precision not in DTYPES:
        raise unknown("dtype", precision, DTYPES)
    return where, precision


def _strategies(names: list[str], ratios: list[float], arguments: dict[str, Any]) -> list[Any]:
    """Every strategy at every budget; one without a budget once, at its own thresholds."""
    fields: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in arguments.items():
        name, dot, field = key.partition(".")
        if not dot or name not in fields:
            raise PruningError(f"--pruning-args: '{key}' must be STRATEGY.FIELD, with one of {', '.join(names)}")
        fields[name][field] = value
    return [
        config.resolve(name, {**({} if ratio is None else {"keep_ratio": ratio}), **fields[name]})[0]
        for name in names
        for ratio in (ratios if _free(name) else [None])
    ]


def _free(spec: str) -> bool:
    """Whether a budget is to be given. PruningError for what is not one strategy."""
    strategies = config.resolve(spec)
    if len(strategies) != 1:
        raise PruningError(f"bench times one strategy at a time, '{spec}' is {len(strategies)}")
    return strategies[0].budgeted and not config.is_setting(spec)
