"""Strategies on synthetic tokens, without a model: what `vtp check`, `vtp bench` and the plan of a server ask."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from vtp_plugin import signals
from vtp_plugin.signals.synthetic import Draw, Widths, raw_patches
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens

DEPTH = 32  # layers or blocks of the model that is made up
NARROW = Widths()
REAL = Widths(tower=1024, llm=4096, shared=768, head=64, patch=14)  # LLaVA-1.5-7B


def sample(
    strategy: PruningStrategy,
    n: int,
    *,
    kind: str = "random",
    b: int = 2,
    widths: Widths = NARROW,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> VisualTokens:
    """Tokens with the signals that the strategy needs, fp32 as far as signals are fp32 in a model.

    PruningError if it needs what its stage does not give.
    """
    inside = _inside(strategy)
    if reason := signals.wrong(strategy, inside=inside):
        raise strategy.error(reason)
    draw, made = Draw(b, n, kind, widths, seed), {}
    width = widths.llm if strategy.stage is Stage.LLM else widths.tower
    if strategy.stage is Stage.PIXELS:
        pixels = raw_patches(draw, (b, n, 3, widths.patch, widths.patch))
        tokens, made["pixels"] = pixels.flatten(2), pixels
    else:
        tokens = draw.normal(b, n, width)
    needed = signals.needed(strategy, inside=inside)
    values = {s.name: made[s.name] if s.name in made else draw.value(s, width) for s in needed}
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}
    index = torch.arange(n, device=device).expand(b, n)
    views = (2, 2) if "view" in moved else None
    return VisualTokens(tokens.to(device), grid_of(n), index, views=views, signals=moved)


def grid_of(n: int) -> tuple[int, int]:
    """Rows and columns of n tokens, as square as it goes."""
    rows = next(r for r in range(int(n**0.5), 0, -1) if n % r == 0)
    return rows, n // rows


def run(strategy: PruningStrategy, seen: VisualTokens) -> list[Selection]:
    """Every cut of the strategy on these tokens, each on what the one before left."""
    layers = cuts_of(strategy) or (None,)
    n, selections = seen.tokens.shape[1], []
    for number, layer in enumerate(layers):
        seen = dataclasses.replace(seen, layer=layer, cut=(number, len(layers)), entered=n)
        selections.append(strategy.decide(seen))
        if number + 1 < len(layers):
            seen = survivors(strategy, seen, selections[-1])
    return selections


def cuts_of(strategy: PruningStrategy) -> tuple[int, ...]:
    """The layers or blocks of a model of DEPTH where the strategy cuts; none where it cuts once, outside of them."""
    cuts = {Stage.LLM: strategy.cut_layers, Stage.VIT: strategy.cut_blocks}
    return cuts[strategy.stage](DEPTH) if strategy.stage in cuts else ()


def _inside(strategy: PruningStrategy) -> bool:
    return strategy.stage is Stage.VIT and bool(cuts_of(strategy))


def survivors(strategy: PruningStrategy, seen: VisualTokens, selection: Selection) -> VisualTokens:
    """The tokens after a cut, with their signals; values unrounded, because the judgement is compared."""
    columns, given = torch.stack(selection.sources), signals.given(strategy.stage, inside=_inside(strategy))

    def taken(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not given[name].per_token:
            return value
        axis = given[name].axes.index("N") - 1
        return torch.stack([one.index_select(axis, own) for one, own in zip(value, columns, strict=True)])

    return dataclasses.replace(
        seen,
        tokens=torch.stack(selection.tokens or selection.apply(seen.tokens)),
        index=seen.index.gather(1, columns),
        signals={name: taken(name, value) for name, value in seen.signals.items()},
    )


def row_of(seen: VisualTokens, b: int) -> VisualTokens:
    """One image of several."""
    of_images = {signal.name for signal in signals.everything() if "B" in signal.axes}
    cut = of_images & {name for name, value in seen.signals.items() if value is not None}
    own = {name: value[b : b + 1] if name in cut else value for name, value in seen.signals.items()}
    return dataclasses.replace(seen, tokens=seen.tokens[b : b + 1], index=seen.index[b : b + 1], signals=own)


def selection_of(selection: Selection, b: int) -> Selection:
    """What was decided about one image of several."""
    tokens, source = ((part[b],) if part is not None else None for part in (selection.tokens, selection.source))
    return Selection(selection.keep[b : b + 1], tokens=tokens, source=source)


def same(ours: list[Selection], theirs: list[Selection]) -> bool:
    """Same columns and, up to rounding, same values."""
    for one, other in zip(ours, theirs, strict=True):
        if any(not a.equal(b) for a, b in zip(one.sources, other.sources, strict=True)):
            return False
        pairs = zip(one.tokens or (), other.tokens or (), strict=True)
        if any(not torch.allclose(a.float(), b.float(), atol=1e-4, rtol=1e-4) for a, b in pairs):
            return False
    return True
