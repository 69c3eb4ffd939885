"""What a pass answers, in the caller's columns: logits in every form of `logits_to_keep`, hidden states, attentions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.columns import Columns
from vtp_plugin.tokens import last_true

LAYERED = ("hidden_states", "attentions")


@dataclass(frozen=True)
class Wanted:
    """The columns whose logits a caller wants: an int (the last so many, 0 for all), positions, or a mask."""

    given: Any
    length: int  # columns of the caller
    ends: Tensor | None = None  # [B]: the last columns of prompts that may have lost them

    @property
    def every(self) -> bool:
        return isinstance(self.given, int) and (self.given == 0 or self.given >= self.length)

    @property
    def positions(self) -> bool:
        """Whether single columns are named."""
        return isinstance(self.given, Tensor)

    @property
    def first(self) -> int:
        """The first of them."""
        if self.every:
            return 0
        if not self.positions:
            return self.length - self.given
        chosen = self.given.dtype is torch.bool
        named = self.given.nonzero()[:, -1] if chosen else self.given.flatten() % self.length
        return int(named.min()) if named.numel() else self.length - 1

    def at_the_end(self, left: Columns) -> bool:
        """Whether they are the last columns of what is left."""
        return not self.positions and 0 < self.given <= left.tail

    def window(self, left: Columns) -> int:
        """How many of the last columns that are left hold all of them; at least one."""
        if self.at_the_end(left):
            return self.given
        wanted = left.columns >= self.first
        if self.ends is not None:
            speaking = torch.arange(left.short, device=wanted.device) == self._speaking(left.columns)[:, None]
            wanted |= speaking & (self.ends >= self.first)[:, None]
        wanted = wanted.any(0)
        return left.short - int(wanted.int().argmax()) if wanted.any() else 1

    def of(self, short: Tensor, left: Columns) -> Tensor:
        """Logits [B, K, V] of the last of the columns that are left -> those that the caller wants."""
        if self.at_the_end(left) and short.shape[1] == self.given:
            return short
        first = self.first
        last = left.columns[:, -short.shape[1] :]
        at = torch.where(last >= first, last - first, -1)
        whole = left.padded is False and left.short == left.length  # as far as the host knows
        full = Columns(at, left.length - first, padded=not whole).put(short)
        if self.ends is not None:
            full = self._ended(full, short, self._speaking(last).to(short.device))
        if not self.positions:
            return full
        if self.given.dtype is torch.bool:
            chosen = self.given[..., first:]
            return full[:, chosen] if chosen.ndim == 1 else full[chosen]
        where = self.given % self.length - first
        return full[:, where] if where.ndim < 2 else full.take_along_dim(where[..., None], 1)

    def _speaking(self, columns: Tensor) -> Tensor:
        """Where the last one of these columns [B, K] is that belongs to the prompt, [B]."""
        return last_true((columns >= 0) & (columns <= self.ends[:, None]))

    def _ended(self, full: Tensor, short: Tensor, speaking: Tensor) -> Tensor:
        """Logits [B, K, V] where the last column that is left of a prompt says what follows it."""
        at = self.ends.to(full.device) - self.first
        rows, there = torch.arange(len(full), device=full.device), at.clamp(min=0)
        said = torch.where((at >= 0)[:, None], short[rows, speaking], full[rows, there])
        return full.index_put((rows, there), said)


def seen(call: Call, left: Columns, layer: int | None = None) -> Columns:
    """What a decoder layer (None: the last) sees of the columns that are left."""
    earlier = [number for number in call.cuts if layer is None or number <= layer]
    if not earlier:
        return left
    cut = call.cuts[max(earlier)].to(left.columns.device)
    if cut.everything:
        return left
    new = left.short - cut.length
    columns = torch.arange(cut.length, left.short, device=cut.columns.device).expand(len(cut.columns), new)
    valid = torch.cat([cut.valid, cut.valid.new_ones(len(cut.valid), new)], 1)
    return left.within(torch.cat([cut.columns, columns], 1), valid)


def put_back(output: Any, call: Call, left: Columns, queries: int) -> None:
    """Hidden states and attentions of all layers at the caller's columns; of `queries` new ones behind a cache."""
    whole = queries == left.short
    states = getattr(output, "hidden_states", None)
    if states is not None and whole:
        output.hidden_states = tuple(
            None if state is None else _at(seen(call, left, number - 1), left, state)  # None: not asked for
            for number, state in enumerate(states)
        )
    maps = getattr(output, "attentions", None)
    if maps is None:
        return
    back = []
    for number, weights in enumerate(maps):
        if weights is not None:
            at = seen(call, left, number)
            weights = _by_key(at, weights)
            weights = at.put(weights, 2) if whole else weights
        back.append(weights)
    output.attentions = tuple(back)


def _by_key(at: Columns, weights: Tensor) -> Tensor:
    """Attention [B, H, Q, K] with its keys at the caller's columns.

    A layer with a window may hold the last columns only, a static cache has places behind them for tokens to come.
    """
    keys = weights.shape[3]
    if at.short == at.length and at.full:
        return weights
    if keys > at.short:
        put = at.put(weights[..., : at.short], 3)
        return torch.nn.functional.pad(put, (0, max(0, keys - at.length)))
    return replace(at, columns=at.columns[:, -keys:], origin=None).put(weights, 3)


def _at(columns: Columns, left: Columns, state: Tensor) -> Tensor:
    return (columns if state.shape[1] == columns.short else left).put(state)
