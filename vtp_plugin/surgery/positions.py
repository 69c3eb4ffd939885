"""Positions of the tokens that are left: those that they had in the whole prompt, or counted anew.

Position ids with gaps look like packed sequences to transformers, so the host never sees any: it counts the shorter
prompt as ever, and what it counted is looked up on its way into the rotary embedding. Between decoder layers every
layer rotates by its own numbers, and so do the tokens that are generated.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.errors import PruningError
from vtp_plugin.facts.family import Family
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.undo import Undo


@dataclass(frozen=True)
class Choice:
    """What `positions` came to: of the shortened prompt, and of every decoder layer that is cut."""

    prompt: str | None  # original or compact; None: no strategy shortens the prompt
    layers: Mapping[int, str]

    @classmethod
    def of(cls, strategies: Sequence[PruningStrategy], adapter: Family) -> Choice:
        """Raises PruningError where strategies that share one numbering want different ones."""
        early = [s for s in strategies if s.stage is not Stage.LLM]
        for strategy in early:
            if strategy.positions is not None and adapter.fixed_positions:
                raise strategy.error(f"positions cannot be chosen for {adapter.models}: {adapter.fixed_positions}")
        depth, by_layer = len(adapter.decoder_layers), {}
        for strategy in strategies:
            for layer in strategy.cut_layers(depth) if strategy.stage is Stage.LLM else ():
                by_layer.setdefault(layer, []).append(strategy)
        prompt = _agreed(early, adapter.default_positions) if early and not adapter.fixed_positions else None
        return cls(prompt, {layer: _agreed(group, "original") for layer, group in sorted(by_layer.items())})

    def of_strategy(self, strategy: PruningStrategy, depth: int) -> str | None:
        """The value that holds for one of the strategies."""
        if strategy.stage is not Stage.LLM:
            return self.prompt
        return self.layers[strategy.cut_layers(depth)[0]]


def _agreed(strategies: Sequence[PruningStrategy], otherwise: str) -> str:
    """The one numbering of strategies that share it: what they were told, else what their papers do."""
    for asked in ({s.name: s.positions for s in strategies}, {s.name: s.default_positions for s in strategies}):
        values = {name: value for name, value in asked.items() if value is not None}
        if len(set(values.values())) > 1:
            wishes = ", ".join(f"{name} {value}" for name, value in values.items())
            raise PruningError(f"strategies that cut the same prompt share one numbering ({wishes}): say positions=...")
        if values:
            return next(iter(values.values()))
    return otherwise


def lookup(positions: Tensor, valid: Tensor, lengths: Tensor) -> Tensor:
    """What the host counts -> original position, [B, L + 1]; the last column belongs to a new token.

    `positions` [B, L] of the tokens that are left where `valid` [B, L]; `lengths` [B] of the whole prompts.
    """
    counts, width = valid.sum(1, keepdim=True), valid.shape[1]
    table = lengths[:, None] + torch.arange(width + 2, device=valid.device) - counts
    rank = torch.where(valid, valid.cumsum(1) - 1, width + 1)  # what is no token goes behind the table
    return table.scatter_(1, rank, positions)[:, : width + 1]


def looked_up(table: Tensor, counted: Tensor) -> Tensor:
    """Original positions of what the host counted, [B or 1, L], or the same on several axes, [A, B or 1, L].

    Rows of the table [B', n + 1] repeat for beams.
    """
    if counted.ndim == 3:
        return torch.stack([looked_up(table, axis) for axis in counted])
    rows = max(len(table), len(counted))
    table, counted = table.repeat_interleave(rows // len(table), 0), counted.expand(rows, -1)
    last = table.shape[1] - 1
    return table.gather(1, counted.clamp(max=last)) + (counted - last).clamp(min=0)


class OriginalPositions:
    """The look-up in front of the language model's rotary embedding."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def install(self, undo: Undo) -> None:
        undo.before(self.session.adapter.language_model.rotary_emb, self._rotating)

    def _rotating(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        call = self.session.call
        if call is None or call.positions is None:
            return None
        call.positions_used = True
        first = self.session.adapter.first_position
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": looked_up(call.positions, kwargs["position_ids"] - first) + first}
        return (args[0], looked_up(call.positions, args[1] - first) + first, *args[2:]), kwargs


@dataclass(frozen=True)
class Numbering:
    """Positions of the columns that a decoder layer sees, where they are not the host's."""

    positions: Tensor  # [B, K]
    following: Tensor  # [B]: position of the first new token
    applies: Tensor  # [B] bool: rows that lost nothing keep the host's

    @classmethod
    def counted(cls, valid: Tensor, before: Tensor, earlier: Numbering | None) -> Numbering:
        """Anew from 0 for the valid columns [B, K], of `before` [B] that there were."""
        counts = valid.sum(1)
        shrunk = counts < before
        applies = shrunk if earlier is None else shrunk | earlier.applies
        return cls((valid.cumsum(1) - 1).clamp(min=0), counts, applies)

    def taken(self, chosen: Tensor) -> Numbering:
        """The columns `chosen` [B, K'] with the positions that they have."""
        return Numbering(self.positions.gather(1, chosen), self.following, self.applies)

    def of_rows(self, rows: Sequence[int]) -> Numbering:
        """The same of some rows."""
        return Numbering(self.positions[rows], self.following[rows], self.applies[rows])

    def to(self, device: torch.device) -> Numbering:
        """The same on another device."""
        return Numbering(*(tensor.to(device) for tensor in (self.positions, self.following, self.applies)))

    def upto(self, keys: int, queries: int) -> Tensor:
        """Positions of the last `queries` of `keys` columns, [B, queries]; new tokens follow."""
        new = torch.arange(keys - self.positions.shape[1], device=self.positions.device)
        return torch.cat([self.positions, self.following[:, None] + new], 1)[:, -queries:]


def rotary_tables(model: nn.Module, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """Cosines and sines of positions [B, L] as a decoder layer of the model rotates by them, [B, L, d] each."""
    rotary = model.rotary_emb
    of_type = "layer_type" in inspect.signature(type(rotary).forward).parameters
    kind = {"layer_type": model.config.layer_types[layer]} if of_type else {}
    if hasattr(rotary, "mrope_section"):  # the same number on all axes
        positions = positions.expand(3, -1, -1)
    return rotary.forward(hidden, positions, **kind)
