"""What a prompt was made shorter to, and how later passes over its cache are told so.

A cache that a pruned model filled carries its `Turn`: a caller who hands it back (a decoding loop, a second turn) goes
on speaking of the whole prompt, in masks, positions and lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.errors import PruningError
from vtp_plugin.surgery import cache, spoken
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.columns import Columns
from vtp_plugin.surgery.positions import lookup
from vtp_plugin.surgery.spoken import OfCache, Spoken
from vtp_plugin.tokens import last_true

MARK = "_vtp_turn"
REGROUPING = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")  # of a cache: they move its rows
REFUSED_POSITIONS = "pruning cannot shorten a prompt that comes with its own position_ids"
OTHERWISE = "the cache was filled while the model was pruned otherwise: begin with the prompt again"


@dataclass(eq=False)
class Turn:
    """One prompt and what is left of it."""

    owner: int  # number of the Pruned that made it
    ids: Tensor  # [B, L] of the caller
    real: Tensor  # [B, L] bool: what is no padding in them
    columns: Columns
    numbering: str | None  # original or compact; None: the host's own, of a prompt that was not shortened
    first: int = 0  # the host's number of the first token
    untouched: bool = False  # nothing was dropped before the language model
    by_column: bool = True  # the host counts columns, padding included; else real tokens
    shift: Tensor | None = None  # [B]: what a new token's number becomes, where the caller counts
    several: bool = False  # its positions have several axes
    known: tuple[Tensor, list[bool]] | None = None  # position ids of the prompt, and how they count: `_counting`
    facts: dict[str, Any] = field(default_factory=dict)  # of the call: images, valid, cuts, positions
    carried: dict[str, Any] = field(default_factory=dict)  # attributes [B, ...] of the model that its passes share

    @property
    def length(self) -> int:
        """Columns of the caller's prompt."""
        return self.ids.shape[1]

    @property
    def dropped(self) -> Tensor:
        """How many tokens every row lost, [B]."""
        lost = self.real.sum(1) - self.columns.valid.sum(1)
        return torch.zeros_like(lost) if self.untouched else lost  # its columns are all there, padding included

    def ends(self, rows: int) -> Tensor | None:
        """The last real column of every prompt, [rows]; None if no row has lost it."""
        if self.columns.tail:
            return None
        return last_true(self.real).repeat_interleave(rows // len(self.ids), 0)

    def begins(self, ids: Tensor, given: Tensor | None = None) -> bool:
        """Whether these ids [B', L + n] are the prompt, perhaps repeated, and what was generated behind it.

        How the position ids that come with them count is asked at once, for `shortened`.
        """
        rows, more = divmod(len(ids), len(self.ids))
        if more or ids.shape[1] < self.length:
            return False
        asked = [(ids[:, : self.length] == self.ids.repeat_interleave(rows, 0)).all()]
        if given is not None and given.ndim == 2 and not self.untouched:
            asked += self._counting(given, ids.shape[1] - self.length)
        same, *counting = torch.stack(asked).tolist()
        self.known = (given, counting) if counting else None
        return same

    def of_rows(self, chosen: Tensor, rows: int) -> Turn:
        """The same of these rows [n] of the `rows` that its cache had, beams and returned sequences among them."""
        chosen = chosen.to(self.ids.device)
        own = torch.arange(len(self.ids), device=chosen.device).repeat_interleave(rows // len(self.ids))[chosen]
        picked = chosen.tolist()
        facts = {
            **self.facts,
            "valid": self.facts["valid"][own.to(self.facts["valid"].device)],
            "positions": None if self.facts["positions"] is None else self.facts["positions"][own],
            "cuts": {layer: cut.of_rows(picked, rows) for layer, cut in self.facts["cuts"].items()},
        }
        shift = None if self.shift is None else self.shift[own]
        carried = {
            name: value if value is None else value[own.to(value.device)] for name, value in self.carried.items()
        }
        known = {"ids": self.ids[own], "real": self.real[own], "columns": self.columns.of_rows(own), "known": None}
        return replace(self, **known, shift=shift, facts=facts, carried=carried)

    # -- positions ------------------------------------------------------------------------------------------------

    def shortened(self, given: Tensor | None, new: int) -> Tensor | None:
        """Position ids of the whole prompt and `new` tokens behind it as the host shall count; sets the counting."""
        if given is None or self.untouched:
            self.by_column, self.shift = given is None, None
            return given
        known, self.known = self.known, None
        at, positions = self.columns.followed(new), given
        given, real = self._beside(given, new)
        at = at.repeated(given.shape[-2])
        self.several = given.ndim == 3
        if self.several:
            return self._axes(given, at, real)
        told = known is not None and known[0] is positions
        by_token, by_column = known[1] if told else torch.stack(self._counting(positions, new)).tolist()
        self.by_column = not by_token
        if self.by_column and not by_column:
            raise PruningError(REFUSED_POSITIONS)
        if self.by_column:
            self.shift = torch.full_like(self.dropped, self.columns.short - self.length)
            return torch.arange(at.short, device=given.device).expand(len(at.columns), -1) + self.first
        self.shift = -self.dropped
        return (at.valid.cumsum(1) - 1).clamp(min=0) + self.first

    def _beside(self, given: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """Position ids with one row per sequence, and which columns are real [B', L + new]."""
        real = torch.cat([self.real, self.real.new_ones(len(self.real), new)], 1)
        if given.shape[-2] == 1:
            given = given.expand(*given.shape[:-2], len(real), -1)
        return given, real.repeat_interleave(given.shape[-2] // len(real), 0)

    def _counting(self, given: Tensor, new: int) -> list[Tensor]:
        """Whether position ids [B' or 1, L + new] count real tokens, and whether they count columns."""
        given, real = self._beside(given - self.first, new)
        every = torch.arange(real.shape[1], device=given.device).expand_as(given)
        return [_same(given, (real.cumsum(1) - 1).clamp(min=0), real), _same(given, every, real)]

    def _axes(self, given: Tensor, at: Columns, real: Tensor) -> Tensor:
        """The same of several axes, [A, B, L]; of four, the first counts text, for the masks."""
        self.by_column = False
        counted = (at.valid.cumsum(1) - 1).clamp(min=0)
        lost = real.sum(1) > at.valid.sum(1)
        places = at.columns if at.origin is None else at.origin
        taken = torch.where(at.valid, given.gather(2, places.clamp(min=0).expand(len(given), -1, -1)), 0)
        if self.numbering == "compact":
            taken = torch.where(lost[:, None], counted, taken)
        if len(given) == 4:
            taken[0] = counted
        self.shift = torch.zeros_like(self.dropped)
        if self.numbering == "compact":  # a new token continues behind the highest number of the prompt
            highest = torch.where(real, given[-3:], 0)[..., : self.length].amax((0, 2))[:: len(real) // len(self.ids)]
            self.shift = torch.where(self.dropped > 0, self.columns.valid.sum(1) - 1 - highest, 0)
        return taken

    def moved(self, given: Tensor | None) -> Tensor | None:
        """Position ids [B, q] or [A, B, q] of new tokens."""
        if given is None or self.shift is None:
            return given
        if given.ndim == 3 and not self.several:
            raise PruningError("position_ids of new tokens have other axes than those of the prompt in the cache")
        if given.ndim == 2 or len(given) < 4:  # one axis or three
            return given + self._beside_new(self.shift, given)
        dropped = self._beside_new(self.dropped, given)
        text, axes = given[:1] - dropped, given[1:]  # four: that of text comes first
        if self.numbering == "compact":
            axes = torch.where(dropped > 0, text, axes)
        return torch.cat([text, axes])

    def _beside_new(self, own: Tensor, given: Tensor) -> Tensor:
        """What rows of the prompt have, [B], for position ids of new tokens, where beams may share it: [B', 1]."""
        return own.to(given.device).repeat_interleave(max(1, given.shape[-2] // len(own)), 0)[:, None]

    def table(self) -> Tensor | None:
        """What the host counts -> original positions, for the rotary embedding; see `surgery.positions.lookup`."""
        if self.numbering != "original":
            return None
        real = torch.ones_like(self.real) if self.by_column else self.real
        kept = torch.ones_like(self.columns.valid) if self.by_column else self.columns.valid
        places = self.columns.columns if self.columns.origin is None else self.columns.origin
        ranks = (real.cumsum(1) - 1).gather(1, places.clamp(min=0))
        return lookup(ranks, kept, real.sum(1))

    # -- later passes ---------------------------------------------------------------------------------------------

    def call(self, rows: int) -> Call:
        """The state of a call that goes on behind the prompt, with so many sequences."""
        call = Call(**self.facts, rows=len(self.ids), positions_used=True)
        if call.positions is not None:
            call.positions = call.positions.repeat_interleave(rows // len(self.ids), 0)
        return call

    def behind(self, rows: int, queries: int, stored: int) -> Columns:
        """What the cache holds of `stored` columns, and the `queries` new ones, in the caller's columns."""
        done = stored - self.columns.short
        held = self.columns if done >= 0 else self._cropped(-done)
        return held.repeated(rows).followed(max(0, done) + queries)

    def _cropped(self, lost: int) -> Columns:
        """The prompt without its last `lost` columns, which were taken out of the cache; only text can be."""
        tail = torch.arange(self.length - lost, self.length, device=self.ids.device)
        text = lost < self.columns.short and (
            lost <= self.columns.tail or bool((self.columns.columns[:, -lost:] == tail).all())
        )
        if not text or self.facts["cuts"]:
            raise PruningError("the cache was cropped into what is left of an image: begin with the prompt again")
        return Columns(self.columns.columns[:, :-lost], self.length - lost)


def _same(given: Tensor, expected: Tensor, real: Tensor) -> Tensor:
    return ((given == expected) | ~real).all()


# -- on the cache -----------------------------------------------------------------------------------------------------


class Regrouped(OfCache):
    """The method `said`, which takes rows of a cache or repeats them: its prompt has the same rows afterwards.

    The host's own beams stay within their prompt.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stored = self.stored()
        turn, rows, given = getattr(stored, MARK), _rows(stored), next(iter((*args, *kwargs.values())))
        answer = getattr(type(stored), self.said)(stored, *args, **kwargs)
        if not spoken.in_generate():
            every = torch.arange(rows)
            chosen = given if isinstance(given, Tensor) else every.repeat_interleave(given)
            remember(stored, turn.of_rows(every[chosen.cpu()], rows))
        return answer


def _rows(stored: Any) -> int:
    """How many sequences a cache holds."""
    return next(len(layer.keys) for layer in stored.layers if isinstance(getattr(layer, "keys", None), Tensor))


def stored_length(stored: Any) -> int:
    """How many columns a cache really holds in its first layer. PruningError for one that cannot say it."""
    if stored is None:
        return 0
    length = getattr(type(stored), "get_seq_length", None)
    if length is None:
        raise PruningError(f"pruning needs a cache of transformers (DynamicCache), got {type(stored).__name__}")
    return int(length(stored))


def remember(stored: Any, turn: Turn) -> None:
    """Let a cache that holds a pruned prompt say so."""
    if stored is None:
        return
    setattr(stored, MARK, turn)
    if not getattr(stored, "is_compileable", False):
        stored.get_seq_length = Spoken(stored, turn.length - turn.columns.short)
    for name in REGROUPING:
        if hasattr(stored, name):
            setattr(stored, name, Regrouped(stored, name))


def forget(stored: Any) -> None:
    """A cache that is empty again holds no prompt."""
    if not hasattr(stored, MARK) or stored_length(stored):
        return
    for name in (MARK, "get_seq_length", *REGROUPING):
        if name in getattr(stored, "__dict__", ()):
            delattr(stored, name)


def recall(arguments: Mapping[str, Any]) -> Turn | None:
    """The prompt in the filled cache among these arguments, if it was pruned."""
    stored = cache.given(arguments)
    turn = None if stored is None else getattr(stored, MARK, None)
    return turn if turn is not None and stored_length(stored) else None
