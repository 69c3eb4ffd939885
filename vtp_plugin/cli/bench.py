"""Time to first token with random weights in a real shape: pruned against unpruned and against the ideal."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from vtp_plugin import plugins
from vtp_plugin.errors import PruningError, unknown

DTYPES = ("float32", "bfloat16", "float16")


def command(
    shape: Annotated[str, typer.Option(help="llava-1.5-7b or llava-1.5-13b.")] = "llava-1.5-7b",
    layers: Annotated[int, typer.Option(help="Decoder layers; 0 for the shape's own.")] = 0,
    pruning: Annotated[str, typer.Option(help="Strategies, separated by commas.")] = "l2,visionzip,fastv,random,stride",
    keep: Annotated[str, typer.Option(help="Keep ratios, separated by commas.")] = "0.5,0.25",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1",
    repeats: Annotated[int, typer.Option(help="Timed rounds; medians are reported.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda; chosen by itself.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; chosen by itself.")] = "",
    attention: Annotated[str, typer.Option(help="eager, sdpa or flash_attention_2.")] = "sdpa",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the numbers to this JSON.")] = None,
) -> None:
    import torch

    from vtp_plugin.integrations import bench

    if shape not in bench.SHAPES:
        raise unknown("shape", shape, bench.SHAPES)
    ratios = _numbers(keep, float, "--keep")
    chosen = [strategy for name in pruning.split(",") for strategy in _strategies(name.strip(), ratios)]
    batches = _numbers(batch, int, "--batch")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    if precision not in DTYPES:
        raise unknown("dtype", precision, DTYPES)
    model = bench.build(shape, layers or None, where, getattr(torch, precision), attention)
    timings = [
        timing
        for size in batches
        for strategy in track(chosen, description=f"batch {size}", transient=True)
        for timing in bench.compare(model, [strategy], _Levels(), size, repeats)
    ]
    Console(highlight=False).print(_table(timings, shape, model).rich())
    if output is not None:
        output.write_text(json.dumps(_record(timings, shape, model, where, precision, attention), indent=2) + "\n")


class _Levels:
    """Stands in for an image processor: the pictures are random numbers."""

    image_mean, image_std, do_normalize = [0.5] * 3, [0.25] * 3, True

    def preprocess(self, images: Any) -> None:
        """Never called: the pixels are made without it."""


def _strategies(name: str, ratios: list[float]) -> list[Any]:
    """The strategy at every budget; one without a budget once, at its own thresholds."""
    cls = plugins.get_strategy(name)
    return [cls(keep_ratio=ratio) for ratio in ratios] if cls.budgeted else [cls()]


def _numbers(text: str, kind: type, option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise PruningError(f"{option} must be numbers separated by commas, got '{text}'") from None


def _table(timings: list[Any], shape: str, model: Any) -> Any:
    from vtp_plugin.reporting.tables import Table

    columns = ("strategy", "keep", "batch", "tokens", "FLOPs", "TTFT", "realised", "of ideal", "selector", "break-even")
    table = Table(columns, title=f"{shape}, {model.config.text_config.num_hidden_layers} decoder layers")
    for t in timings:
        table.add(
            t.strategy,
            f"{t.keep:g}" if t.keep else "-",
            t.batch,
            f"{t.tokens_after:.0f}/{t.tokens_before}",
            f"{t.flops_ratio:.2f}x",
            f"{t.ttft_ratio:.2f}x",
            f"{t.realised:.0%}" if t.realised is not None else "-",
            f"{t.over_ideal:.3f}x",
            f"{t.selector_seconds * 1e3:.1f} ms",
            f"{t.break_even:.0f}" if t.break_even is not None else "-",
        )
    return table


def _record(timings: list[Any], shape: str, model: Any, device: Any, dtype: str, attention: str) -> dict[str, Any]:
    import torch

    from vtp_plugin.reporting.record import versions

    return {
        "command": shlex.join(["vtp", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "attention": attention,
        "shape": shape,
        "decoder_layers": model.config.text_config.num_hidden_layers,
        "versions": versions(),
        "timings": [timing.as_json() for timing in timings],
    }
