"""The tables of `vtp plan`: unpruned beside pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.hosts.transformers import shapes
from vtp_plugin.plan import queue
from vtp_plugin.plan.cards import Card
from vtp_plugin.plan.roofline import ITEMSIZE, Roof, fitting, pays_from
from vtp_plugin.plan.work import PARTS, Model, pruned, scaled, unpruned
from vtp_plugin.reporting.tables import Table
from vtp_plugin.strategy import PruningStrategy

SIZES = tuple(2**n for n in range(3, 14))  # visual tokens that are looked at to say from where pruning pays
MILLION = 1e6


@dataclass(frozen=True)
class Workload:
    """What is asked of a card."""

    pictures: int = 1
    text: int = 75
    answer: int = 128
    concurrency: int = 32
    dtype: str = "bfloat16"
    overhead: float = 0.0  # seconds per call of the pruned model beside FLOPs and bytes

    def check(self) -> None:
        """Refuse numbers that make no sense."""
        for name in ("pictures", "text", "answer", "concurrency"):
            if getattr(self, name) < 1:
                raise PruningError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in ITEMSIZE:
            raise unknown("dtype", self.dtype, ITEMSIZE)


@dataclass(frozen=True)
class Sides:
    """The same request with and without pruning."""

    unpruned: Roof
    pruned: Roof
    name: str

    def each(self) -> tuple[Roof, Roof]:
        return self.unpruned, self.pruned


def planned(name: str, layers: int = 0) -> Model:
    """The model of a published shape or of a configuration file."""
    shape = shapes.shape_from(Path(name)) if name.endswith(".json") else shapes.shape_of(name)
    depth = (shape.text or {}).get("num_hidden_layers", 0)
    if layers and not 1 <= layers <= depth:
        raise PruningError(f"--layers must be in 1 ... {depth} for this model, or 0 for all, got {layers}")
    return Model.of(name, shape, layers)


def sides(model: Model, card: Card, strategies: Sequence[PruningStrategy], asked: Workload, kept: float = 0.0) -> Sides:
    """Both sides on one card. PruningError for what the model or the card cannot do."""
    for strategy in strategies:
        if reason := model.adapter.stages[strategy.stage]:
            raise strategy.error(f"{model.adapter.models} has no {strategy.stage.value} stage: {reason}")
    whole = unpruned(model, asked.pictures, asked.text)
    cut = pruned(model, strategies, asked.pictures, asked.text, kept)
    name = "+".join(strategy.name for strategy in strategies) or "none"
    with_overhead = asked.overhead * bool(strategies)
    return Sides(
        Roof(model, whole, card, asked.dtype, asked.answer),
        Roof(model, cut, card, asked.dtype, asked.answer, with_overhead),
        name,
    )


# -- tables -----------------------------------------------------------------------------------------------------------


def parts_table(both: Sides) -> Table:
    """Milliseconds of every part of one request on an idle card, and what bounds it."""
    roof = both.unpruned
    title = f"{roof.model.name}, {roof.dtype}, {roof.card.name}: one request, {both.name}"
    table = Table(("part", "unpruned", "bound by", "pruned", "bound by", "left"), title=title)
    for part in PARTS:
        before, after = (one.part(part) for one in both.each())
        _part_row(table, part, before, after)
    _part_row(table, "decoding step", *(one.step(1) for one in both.each()))
    return table


def _part_row(table: Table, part: str, before: object, after: object) -> None:
    left = f"{after.seconds / before.seconds:.2f}x" if before.seconds else "-"
    bounds = [time.bound if time.seconds else "-" for time in (before, after)]
    table.add(part, _ms(before.seconds), bounds[0], _ms(after.seconds), bounds[1], left)


def summary_table(both: Sides, asked: Workload, price: float = 0.0) -> Table:
    """What a user of the card sees."""
    table = Table(("", "unpruned", "pruned", "gain"), title=f"{both.unpruned.card.name}: {both.name}")
    tokens = [one.work.kept for one in both.each()]
    table.add("visual tokens, last layer", *(f"{n:.0f}" for n in tokens), _times(tokens[0], tokens[1]))
    ttft = [one.ttft() for one in both.each()]
    table.add("time to first token", *map(_ms, ttft), _times(ttft[0], ttft[1]))
    kv = [one.kv_bytes for one in both.each()]
    table.add("KV cache of a prompt", *(f"{n / 2**20:.1f} MiB" for n in kv), _times(kv[0], kv[1]))
    largest = [one.largest_batch for one in both.each()]
    table.add("largest batch", *map(str, largest), _times(largest[1], largest[0]))
    batches = [fitting(one, asked.concurrency) for one in both.each()]
    table.add(f"batch at concurrency {asked.concurrency}", *map(str, batches), _times(batches[1], batches[0]))
    speed = [n / one.step(n).seconds for one, n in zip(both.each(), batches, strict=True)]
    table.add("tokens per second, decoding", *(f"{n:.0f}" for n in speed), _times(speed[1], speed[0]))
    rates = [one.requests_per_second(n) for one, n in zip(both.each(), batches, strict=True)]
    table.add("requests per second", *(f"{n:.2f}" for n in rates), _times(rates[1], rates[0]))
    hours = [MILLION / (n * asked.pictures) / 3600 for n in rates]
    what, unit = ("cost", price) if price else ("card hours", 1.0)
    table.add(f"{what} of a million pictures", *(f"{n * unit:.1f}" for n in hours), _times(hours[0], hours[1]))
    return table


def pays(model: Model, card: Card, strategies: Sequence[PruningStrategy], asked: Workload, kept: float = 0.0) -> str:
    """From how many visual tokens on the time to first token falls by a percent at least."""
    ratios = []
    for tokens in SIZES:
        both = sides(scaled(model, tokens), card, strategies, asked, kept)
        ratios.append((tokens, both.pruned.ttft() / both.unpruned.ttft()))
    found = pays_from(ratios)
    if found is None:
        return f"Pruning shortens the time to first token at no number of visual tokens up to {SIZES[-1]}."
    least = "all numbers" if found == SIZES[0] else f"{found} visual tokens"
    return f"Pruning shortens the time to first token from {least} per picture on (looked at: powers of two)."


def queue_table(both: Sides, queued: Sequence[tuple[float, int]], asked: Workload, seed: int, slo: float) -> Table:
    """Poisson arrivals at a rate over a number of cards: what is served, and how long it takes."""
    columns = ("req/s", "cards", "side", "served/s", "TTFT p50", "TTFT p95", "total p95")
    table = Table((*columns, "cards needed") if slo else columns, title=f"queue: {both.name}")
    for rate, cards in queued:
        for side, roof in zip(("unpruned", "pruned"), both.each(), strict=True):
            server = queue.RoofServer(roof, asked.concurrency)
            outcome = queue.simulate(server, rate / cards, seed=seed)
            times = (queue.percentile(outcome.first_token, 0.5), queue.percentile(outcome.first_token, 0.95))
            row = [f"{rate:g}", cards, side, f"{outcome.throughput * cards:.1f}", *map(_seconds, times)]
            row.append(_seconds(queue.percentile(outcome.latency, 0.95)))
            if slo:
                needed = queue.cards_needed(server, rate, slo)
                row.append("-" if needed is None else needed)
            table.add(*row)
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s"


def _times(more: float, less: float) -> str:
    return f"{more / less:.2f}x" if less else "-"
