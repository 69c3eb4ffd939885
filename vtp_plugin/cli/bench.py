"""Time to first token with random weights in a real shape: pruned against unpruned and against the ideal."""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from vtp_plugin import config, files, plugins
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
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write JSON here, a table beside it.")] = None,
) -> None:
    from vtp_plugin.bench import rounds as bench
    from vtp_plugin.hosts.transformers import shapes

    sizes, ratios = shapes.shape_of(shape), _numbers(keep, float, "--keep")
    names = pruning or _usual(selectors, sizes.decodes)
    chosen = _strategies([name.strip() for name in names.split(",")], ratios, config.parse_pairs(pruning_args))
    batches = _numbers(batch or ("1,16" if selectors else "1"), int, "--batch")
    bench.check(sizes, layers, batches, repeats)
    where, precision = _place(device, dtype, attention)
    if output is not None:
        files.check_output(output, kinds=(".json",))
        files.check_output(output.with_suffix(".md"))
    if selectors:
        rows, table = _selectors(chosen, layers, batches, repeats, where, precision)
    else:
        bench.refuse(chosen, sizes)
        rows, table = _timings(shape, chosen, layers, batches, repeats, where, precision, attention)
    table.show(console())
    if output is not None:
        facts = {"shape": shape, "layers": layers, "attention": attention, "dtype": precision}
        files.write_json(output, _record(rows, facts, where))
        files.write(output.with_suffix(".md"), table.markdown() + "\n")


def _timings(
    shape: str, chosen: list[Any], layers: int, batches: list[int], repeats: int, where: Any, dtype: str, attention: str
) -> tuple[list[Any], Any]:
    """Build the model and time every strategy at every batch size."""
    import torch

    from vtp_plugin.bench import rounds as bench
    from vtp_plugin.hosts.transformers import shapes

    sizes = shapes.shape_of(shape)
    model = sizes.build(layers or None, where, getattr(torch, dtype), attention)
    timings = [
        timing
        for size in batches
        for strategy in track(chosen, description=f"batch {size}", transient=True)
        for timing in bench.compare(sizes, model, [strategy], size, repeats)
    ]
    title = shape + (f", {layers} layers" if layers else "")
    return timings, _table(timings, title) if sizes.decodes else _encoder_table(timings, title)


def _selectors(
    chosen: list[Any], layers: int, batches: list[int], repeats: int, where: Any, dtype: str
) -> tuple[list[Any], Any]:
    """Time the strategies on synthetic signals."""
    import torch

    from vtp_plugin.bench import selectors as selector_cost
    from vtp_plugin.reporting.tables import Table

    timed = layers or 1
    found = selector_cost.costs(
        chosen, batches=batches, layers=timed, repeats=repeats, device=where, dtype=getattr(torch, dtype)
    )
    title = f"selection beside the prefill of a LLaVA-1.5-7B ({timed} of 32 decoder layers timed, scaled)"
    table = Table(("strategy", "stage", "tokens", "batch", "kept", "seconds", "of the prefill"), title=title, keys=4)
    for c in found:
        table.add(c.strategy, c.stage, c.tokens, c.batch, f"{c.kept:.0f}", f"{c.seconds:.4f}", f"{c.share:.2%}")
    return found, table


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


def _numbers(text: str, kind: type, option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise PruningError(f"{option} must be numbers separated by commas, got '{text}'") from None


# -- what is shown and written ----------------------------------------------------------------------------------------


def _table(timings: list[Any], title: str) -> Any:
    from vtp_plugin.reporting.tables import Table

    columns = ("strategy", "keep", "batch", "tokens", "FLOPs", "TTFT", "prefill", "realised", "of ideal", "selector")
    table = Table((*columns, "break-even", "KV bytes", "peak bytes", "decode", "attach"), title=title, keys=3)
    for t in timings:
        table.add(
            *_first_columns(t),
            f"{t.ttft_ratio:.2f}x",
            f"{t.prefill_ratio:.2f}x",
            _share(t.realised),
            f"{t.over_ideal:.3f}x",
            _milliseconds(t.selector),
            f"{t.break_even:.0f}" if t.break_even is not None else "-",
            f"{t.kv_bytes['after'] / t.kv_bytes['before']:.2f}x",
            f"{t.peak_bytes['pruned'] / t.peak_bytes['unpruned']:.2f}x" if t.peak_bytes else "-",
            f"{t.decode_ratio:.2f}x",
            _milliseconds(t.attaching),
        )
    return table


def _encoder_table(timings: list[Any], title: str) -> Any:
    from vtp_plugin.reporting.tables import Table

    columns = ("strategy", "keep", "batch", "tokens", "FLOPs", "images/s", "unpruned", "speed", "realised", "of ideal")
    table = Table(columns, title=title, keys=3)
    for t in timings:
        rates = (f"{t.images_per_second[side]:.1f}" for side in ("pruned", "unpruned"))
        shares = (f"{1 / t.ttft_ratio:.2f}x", _share(t.realised), f"{t.over_ideal:.3f}x")
        table.add(*_first_columns(t), *rates, *shares)
    return table


def _first_columns(t: Any) -> tuple[Any, ...]:
    keep, tokens = f"{t.keep:g}" if t.keep else "-", f"{t.tokens_after:.0f}/{t.tokens_before}"
    return t.strategy, keep, t.batch, tokens, f"{t.flops_ratio:.2f}x"


def _share(value: float | None) -> str:
    return f"{value:.0%}" if value is not None else "-"


def _milliseconds(seconds: list[float]) -> str:
    from statistics import median

    return f"{median(seconds) * 1e3:.1f} ms"


def _record(rows: list[Any], facts: dict[str, Any], device: Any) -> dict[str, Any]:
    import torch

    from vtp_plugin.reporting.record import versions

    return {
        "command": shlex.join(["vtp", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        **facts,
        "versions": versions(),
        "timings": [row.as_json() for row in rows],
    }
