"""What pruning would save on a card: time to first token, throughput, memory and cost, before it is rented."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vtp_plugin import config, files
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.terminal import console


def command(
    model: Annotated[str, typer.Option(help="A shape's name, e.g. llava-1.5-7b, or a config.json.")] = "llava-1.5-7b",
    device: Annotated[str, typer.Option(help="h100 (the default), a100, l4, ...; probe; or a file.")] = "",
    pruning: Annotated[str, typer.Option(help="Strategies, as for --pruning of lmms-eval.")] = "l2",
    pruning_args: Annotated[str, typer.Option(help="Their hyper-parameters, e.g. keep_ratio=0.25.")] = "",
    kept: Annotated[float, typer.Option(help="The share that is left, for strategies whose data decide it.")] = 0.0,
    pictures: Annotated[int, typer.Option(help="Pictures per prompt.")] = 1,
    text: Annotated[int, typer.Option(help="Text tokens per prompt.")] = 75,
    answer: Annotated[int, typer.Option(help="Tokens per answer.")] = 128,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 32,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    layers: Annotated[int, typer.Option(help="Decoder layers; 0 for the model's own.")] = 0,
    price: Annotated[float, typer.Option(help="Of one card for an hour; 0 counts card hours.")] = 0.0,
    overhead: Annotated[float, typer.Option(help="Milliseconds per call beside FLOPs and bytes.")] = 0.0,
    rate: Annotated[str, typer.Option(help="Requests per second to queue, separated by commas.")] = "",
    cards: Annotated[str, typer.Option(help="Numbers of cards to queue on, separated by commas.")] = "1",
    slo: Annotated[float, typer.Option(help="Seconds to the first token that p95 may take; counts cards.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    check: Annotated[Path | None, typer.Option(help="A record of vtp bench to compare the plan with.")] = None,
    save_device: Annotated[Path | None, typer.Option(help="Write the device, as probed, to this file.")] = None,
) -> None:
    from vtp_plugin.plan import cards as known
    from vtp_plugin.plan import pages

    if check is not None:
        from vtp_plugin.plan.error import compared, dtype_of, error_table

        _show(error_table(compared(check, known.card_of(device, dtype_of(check)) if device else None)))
        return
    _refuse_numbers(kept=kept, price=price, overhead=overhead, slo=slo)
    asked = pages.Workload(pictures, text, answer, concurrency, dtype, overhead / 1e3)
    asked.check()
    if save_device is not None:
        files.check_output(save_device, read=[Path(device)] if device else [])
    chosen = config.resolve(pruning, config.parse_pairs(pruning_args))
    planned = pages.planned(model, layers)
    queued = _rates(rate, cards)
    card = known.card_of(device or "h100", dtype)
    if save_device is not None:
        files.write_json(save_device, card.as_json())
    sides = pages.sides(planned, card, chosen, asked, kept)
    tables = [pages.parts_table(sides), pages.summary_table(sides, asked, price)]
    for table in tables:
        _show(table)
    console().print(pages.pays(planned, card, chosen, asked, kept) + "\n")
    if queued:
        _show(pages.queue_table(sides, queued, asked, seed, slo))


def _refuse_numbers(**said: float) -> None:
    """Refuse what is no amount of anything."""
    for name, value in said.items():
        if not 0 <= value < math.inf:
            raise PruningError(f"--{name} must not be negative, and finite, got {value:g}")
    if said["kept"] > 1:
        raise PruningError(f"--kept must be a share in (0, 1], got {said['kept']:g}")


def _show(table: Any) -> None:
    """As wide as a page, on a terminal and in a log."""
    table.show(Console(width=80, markup=False, emoji=False, highlight=False))
    console().print()


def _rates(rate: str, cards: str) -> list[tuple[float, int]]:
    """Every rate on every number of cards."""
    if not rate:
        return []
    rates, numbers = config.parse_numbers(rate, float, "--rate"), config.parse_numbers(cards, int, "--cards")
    if not all(0 < one < math.inf for one in rates) or min(numbers) < 1:
        raise PruningError(f"--rate must be above 0 and --cards at least 1, got {min(rates):g} and {min(numbers)}")
    return [(one, number) for one in rates for number in numbers]
