"""Cuts behind the host's own arrangement of a tower's output into rows of the prompt.

Rows are taken out: those of tokens that were dropped in the tower, and those that projector-stage strategies drop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.facts.image import Image
from vtp_plugin.signals import RowsView, Signal
from vtp_plugin.signals.views import tapped
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.arrangement import Arrangement, Group, ImageRows
from vtp_plugin.surgery.columns import Rows
from vtp_plugin.surgery.judging import Judgement
from vtp_plugin.surgery.question import CallQuestions
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.surgery.vision import Cutting, space_of
from vtp_plugin.tokens import true_columns


class RowsLate(Cutting):
    """Cuts rows of the prompt, once the host has made them."""

    shared_budgets = (Stage.PROJECTOR,)
    arranged = True

    def install(self, undo: Undo) -> None:
        if self.vision.at(Stage.PROJECTOR):
            undo.before(self.family.projector, self._projecting)

    def _projecting(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep what goes into the projector."""
        if self.passing is not None:
            self.passing.features = args[0] if args else kwargs["hidden_states"]

    def rows(self, features: Sequence[Tensor]) -> list[tuple[Tensor, Rows]]:
        """What is left of the rows [n, D'] that the host made of the images in the tower."""
        made = Arrangement(self.vision)
        parts = made.parts(features)
        for strategy in self.vision.at(Stage.PROJECTOR):
            with self.session.judging(strategy) as cut:
                before = [len(part.source) for part in parts]
                groups = made.groups(strategy, parts)
                pieces = [piece for group in groups for piece in self._decide(cut, made, group)]
                for part in parts:
                    part.become([rest for owner, *rest in pieces if owner is part])
                for part, count in zip(parts, before, strict=True):
                    cut.note(part.number, count, part.source)
        return [self._finished(part, rows) for part, rows in zip(parts, features, strict=True)]

    def _decide(self, cut: Judgement, made: Arrangement, group: Group) -> list[tuple[ImageRows, Tensor, ...]]:
        """One decision about rows of one or several images: per part source, tokens and features of what is left."""
        rows = GroupRows(made, cut.strategy, group)
        features, source, owner = rows.projected[0], rows.source, rows.owner
        found = self.vision.signals_of(cut.strategy, rows, rows.carried)
        views = {"views": rows.images[0].views} if found.get("view") is not None else {}
        owners = [(rows.first, 0)] if len(group) == 1 else ()
        selection = cut.ask(rows.tokens, rows.index, rows.grid, found, owners, **views)
        chosen = selection.sources[0]
        tokens = selection.apply(rows.tokens)[0]
        if selection.tokens is None:
            features = features[chosen]
        else:
            features = self.family.projector(tokens[None])[0] if made.tokenwise else tokens
        source = torch.where(chosen >= 0, source[chosen.clamp(min=0)], -1)
        owner = torch.where(chosen >= 0, owner[chosen.clamp(min=0)], 0)
        if len(group) == 1:
            return [(group[0][0], source, tokens, features)]
        left = _owned(owner, len(group))
        return [(part, source[m], tokens[m], features[m]) for (part, _), m in zip(group, left, strict=True)]

    def _finished(self, part: ImageRows, rows: Tensor) -> tuple[Tensor, Rows]:
        """The rows of an image that enter the prompt, in the order of the host where nothing was merged."""
        image = self.call.images[part.number]
        image.index, image.fixed = part.source, len(part.fixed)
        image.entered = len(part.source) + len(part.fixed)
        source = torch.cat([part.source, part.fixed])
        features = torch.cat([part.features, rows[part.fixed].to(part.features)])
        judged = torch.arange(len(source), device=source.device) < len(part.source)
        place, fixed = torch.arange(len(source), device=source.device), len(part.fixed)
        raster = torch.ones_like(judged) if fixed else (source >= 0).all()
        order = torch.where(raster, source, place).sort(stable=True).indices
        left = Rows(source[order], judged[order], fixed)
        image.index = left.only_judged(left.source)
        return features[order], left


def _owned(owner: Tensor, parts: int) -> list[Tensor]:
    """Which of the rows [K] belong to each of several parts."""
    every = owner == torch.arange(parts, device=owner.device)[:, None]
    return [true_columns(own, count) for own, count in zip(every, every.sum(1).tolist(), strict=True)]


class GroupRows(RowsView):
    """The rows of a group, [1, N, ...]."""

    def __init__(self, arrangement: Arrangement, strategy: PruningStrategy, group: Group) -> None:
        self.arrangement, self.strategy, self.group = arrangement, strategy, group
        self.tower, self.device = arrangement.tower, arrangement.device
        self.embedded = strategy.text_encoder == "llm"
        self.images: list[Image] = [arrangement.vision.call.images[part.number] for part, _ in group]
        self.first = group[0][0].number
        self.fingerprint = (self.images[0].fingerprint,)
        self.owner = torch.cat([torch.full_like(where, n) for n, (_, where) in enumerate(group)])  # [N]
        self.source = torch.cat([part.source[where] for part, where in group])  # [N]

    @property
    def block(self) -> int:
        return self.tower.number(self.strategy.tower_layer)

    @cached_property
    def tokens(self) -> Tensor:
        """[1, N, D]"""
        return torch.cat([part.tokens[where] for part, where in self.group])[None]

    @cached_property
    def projected(self) -> Tensor:
        return torch.cat([part.features[where] for part, where in self.group])[None]

    @cached_property
    def _offsets(self) -> Tensor:
        """Where the rows of every image begin, and the end of the last."""
        return torch.tensor([0, *(image.total for image in self.images)]).cumsum(0)

    @property
    def index(self) -> Tensor:
        """Raster positions [1, N]; those of later images are counted on."""
        if len(self.group) == 1:
            return self.source[None]
        return (self.source + self._offsets.to(self.source.device)[self.owner])[None]

    @property
    def grid(self) -> tuple[int, int]:
        alone = len(self.group) == 1 and self.images[0].grid
        return self.images[0].grid if alone else (1, int(self._offsets[-1]))

    @property
    def space(self) -> CallQuestions:
        return self.arrangement.vision.questions_in(self.strategy)

    @property
    def questions(self) -> Sequence[str]:
        return [self.images[0].question]

    def output(self, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = tapped(self.arrangement.passing.outputs.get(self.block), "OUTPUT")[:, self.tower.prefix :]
        return self._gathered((name, self.block, *space_of(self.strategy)), make(hidden))

    @property
    def class_feature(self) -> Tensor | None:
        """Of the image's first tile, [1, D]."""
        if not self.tower.prefix or not self.arrangement.tokenwise:
            return None
        output = tapped(self.arrangement.passing.outputs.get(self.tower.number(None)), "CLASS")
        return output[self.arrangement.passing.tiles.index(self.first), :1]

    @property
    def units(self) -> Tensor:
        pieces = [self.arrangement.units[part.number][part.source[where]] for part, where in self.group]
        return torch.cat(pieces)[None]

    @property
    def film(self) -> tuple[int, int, int]:
        if len(self.group) > 1:
            raise self.strategy.error(f"frames are those of one video, budget={self.strategy.budget} is of several")
        return self.images[0].film or (1, *self.grid)

    @property
    def frame(self) -> Tensor:
        _, rows, columns = self.film
        return (self.source // (rows * columns))[None]

    @property
    def cell(self) -> Tensor:
        _, rows, columns = self.film
        return torch.stack([self.source // columns % rows, self.source % columns], dim=-1)[None]

    @property
    def view(self) -> Tensor | None:
        if not self._several_views:
            return None
        (part, where), *_ = self.group
        tile = part.tiles if len(where) == len(part.source) else part.tiles[where.cpu()]
        if (tile != tile.round()).any():
            kind = self.arrangement.kind
            raise self.strategy.error(f"it needs whole tiles, the model interpolates across those of this {kind}")
        return tile.long().to(part.source.device)[None]

    @property
    def place(self) -> Tensor | None:
        if not self._several_views:
            return None
        return self.arrangement.of_image("place", self.arrangement.middles, self.first)[self.source][None]

    def carried(self, signal: Signal, block: int) -> Tensor | None:
        """What was read in a block, of the rows that are left."""
        if signal.several_views and not self._several_views:
            return None
        key = signal.name, block
        if not signal.per_token:
            return self.arrangement.passing.whole[key][self.arrangement.passing.tiles.index(self.first)][None]
        return self._gathered(key, self.arrangement.passing.maps[key].float())

    def _gathered(self, key: Any, maps: Tensor) -> Tensor:
        """The rows of the group of a map, [1, N, ...]."""
        pieces = [self.arrangement.of_image(key, maps, part.number)[part.source[where]] for part, where in self.group]
        return torch.cat(pieces)[None]

    @property
    def _several_views(self) -> bool:
        """Whether the rows are those of one image with several views."""
        return len(self.group) == 1 and self.strategy.budget != "per_tile" and self.images[0].views is not None
