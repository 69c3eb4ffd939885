"""Cuts behind the host's own arrangement of a tower's output into rows of the prompt.

Rows are taken out: those of tokens that were dropped in the tower, and those that projector-stage strategies drop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.arrangement import Arrangement, Group, ImageRows
from vtp_plugin.surgery.batching import alike, joined
from vtp_plugin.surgery.columns import Rows
from vtp_plugin.surgery.grouped import GroupRows, Shown, judged_at_once
from vtp_plugin.surgery.judging import Judgement
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.surgery.vision import Cutting
from vtp_plugin.tokens import at, true_columns


class RowsLate(Cutting):
    """Cuts rows of the prompt, once the host has made them."""

    shared_budgets = (Stage.PROJECTOR,)
    arranged = True

    def install(self, undo: Undo) -> None:
        if self.vision.at(Stage.PROJECTOR):
            undo.before(self.family.projector, self._projecting)

    def _projecting(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep what goes into the projector; which rows are which tokens is seen while the device is busy."""
        if self.passing is None:
            return
        self.passing.features = args[0] if args else kwargs["hidden_states"]
        if self.family.tokenwise and self.passing.arranged is None:
            self.passing.arranged = Arrangement(self.vision)

    def rows(self, features: Sequence[Tensor]) -> list[tuple[Tensor, Rows]]:
        """What is left of the rows [n, D'] that the host made of the images in the tower."""
        made = self.passing.arranged = self.passing.arranged or Arrangement(self.vision)
        parts = made.parts(features)
        for strategy in self.vision.at(Stage.PROJECTOR):
            with self.session.judging(strategy) as cut:
                before = [len(part.source) for part in parts]
                shown = [self._shown(made, strategy, group) for group in made.groups(strategy, parts)]
                pieces = [piece for some in judged_at_once(shown) for piece in self._decide(cut, made, some)]
                for part in parts:
                    part.become([rest for owner, *rest in pieces if owner is part])
                for part, count in zip(parts, before, strict=True):
                    cut.note(part.number, count, part.source)
        self.passing.arranged = None  # each holds the other
        return self._finished(parts, features)

    def _shown(self, made: Arrangement, strategy: PruningStrategy, group: Group) -> Shown:
        """Rows that share one budget, with their signals."""
        rows = GroupRows(made, strategy, group)
        return Shown(rows, self.vision.signals_of(strategy, rows, rows.carried))

    def _decide(self, cut: Judgement, made: Arrangement, shown: Sequence[Shown]) -> list[tuple[ImageRows, Tensor, ...]]:
        """One decision about groups that are alike: per part source, tokens and features of what is left."""
        groups, first = [one.rows for one in shown], shown[0]
        tokens, index = joined([rows.tokens for rows in groups]), joined([rows.index for rows in groups])
        found = dict(first.found) | {name: joined([one.found[name] for one in shown]) for name in first.per_image}
        owners = [(rows.first, 0) for rows in groups] if all(len(rows.group) == 1 for rows in groups) else ()
        selection = cut.ask(tokens, index, first.rows.grid, found, owners, **first.facts)
        values = selection.apply(tokens)
        for part in (part for rows in groups for part, _ in rows.group):
            part.ordered &= selection.source is None
        return [
            piece
            for rows, chosen, new in zip(groups, selection.sources, values, strict=True)
            for piece in self._left(made, rows, chosen, new, merged=selection.tokens is not None)
        ]

    def _left(
        self, made: Arrangement, rows: GroupRows, chosen: Tensor, tokens: Tensor, *, merged: bool
    ) -> list[tuple[ImageRows, Tensor, ...]]:
        """What a decision leaves of one group: the rows `chosen` [K], -1 for one that is none of them, now `tokens`."""
        if not merged:
            features = rows.projected[0][chosen]
        else:
            features = self.family.projector(tokens[None])[0] if made.tokenwise else tokens
        if not merged and len(rows.group) == 1:
            return [(rows.group[0][0], rows.source[chosen], tokens, features)]
        source = torch.where(chosen >= 0, rows.source[chosen.clamp(min=0)], -1)
        if len(rows.group) == 1:
            return [(rows.group[0][0], source, tokens, features)]
        left = _owned(torch.where(chosen >= 0, rows.owner[chosen.clamp(min=0)], 0), len(rows.group))
        return [(part, source[m], tokens[m], features[m]) for (part, _), m in zip(rows.group, left, strict=True)]

    def _finished(self, parts: Sequence[ImageRows], rows: Sequence[Tensor]) -> list[tuple[Tensor, Rows]]:
        """The rows of every image that enter the prompt, in the order of the host where nothing was merged."""
        found: dict[int, tuple[Tensor, Rows]] = {}
        for part in parts:
            image = self.call.images[part.number]
            image.index, image.fixed = part.source, len(part.fixed)
            image.entered = len(part.source) + len(part.fixed)
        facts = [(len(part.source), len(part.fixed), part.ordered and not len(part.fixed)) for part in parts]
        for numbers in alike(facts):
            if facts[numbers[0]][-1]:
                found |= {n: (parts[n].features, Rows(parts[n].source, ordered=True)) for n in numbers}
            else:
                some = [(parts[number], rows[number]) for number in numbers]
                found |= zip(numbers, self._in_order(some), strict=True)
        return [found[number] for number in range(len(parts))]

    def _in_order(self, some: Sequence[tuple[ImageRows, Tensor]]) -> list[tuple[Tensor, Rows]]:
        """The same of images with equally many rows, and equally many that are always kept."""
        judged, fixed = len(some[0][0].source), len(some[0][0].fixed)
        source = torch.stack([torch.cat([part.source, part.fixed]) for part, _ in some])  # [G, n]
        features = torch.stack([torch.cat([part.features, rows[part.fixed].to(part.features)]) for part, rows in some])
        place = torch.arange(judged + fixed, device=source.device).expand_as(source)
        rank = source if fixed else torch.where((source >= 0).all(1, keepdim=True), source, place)
        order = rank.sort(dim=-1, stable=True).indices
        source, features, mine = source.gather(1, order), at(features, order), order < judged
        index = source.gather(1, true_columns(mine, judged)) if fixed else source
        for (part, _), own in zip(some, index, strict=True):
            self.call.images[part.number].index = own
        made = zip(features, source, mine, some, strict=True)
        return [(one, Rows(own, of, fixed, part.ordered)) for one, own, of, (part, _) in made]


def _owned(owner: Tensor, parts: int) -> list[Tensor]:
    """Which of the rows [K] belong to each of several parts."""
    every = owner == torch.arange(parts, device=owner.device)[:, None]
    return [true_columns(own, count) for own, count in zip(every, every.sum(1).tolist(), strict=True)]
