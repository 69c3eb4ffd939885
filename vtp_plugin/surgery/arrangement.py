"""The way from a tower's tokens to rows of the prompt, as the host itself arranges them.

Which tokens a row is made of is never computed twice: signals travel through the host's own arrangement as extra
channels (`arrange`), so a row of several tokens gets the mean of their signals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vtp_plugin.errors import PruningError
from vtp_plugin.facts.tower import Tower
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.vision import VisionCuts
from vtp_plugin.tokens import true_columns

MIXED = 0.02  # the variance of token numbers within a row that is made of several
WHOLE = 1e-4  # a row whose tokens are all left has this much of them missing at most


class Arranging(Protocol):
    """What a family tells about the way from tower tokens to rows of the prompt."""

    tower: Tower
    projector: nn.Module
    tokenwise: bool  # the projector works token by token: a strategy sees tower features, not projected rows,
    # unless the host interpolates the projected ones

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels of the tower's tokens, [T, N, C] or [S, C], as the host arranges features: per image [n, C].

        A row that is made of no token (a newline) is nan.
        """


@dataclass
class ImageRows:
    """The rows of one image that a projector-stage strategy may still drop."""

    number: int  # of the image within the call
    source: Tensor  # [k] long: row among those that the host makes, -1 for a merged one that is none of them
    tokens: Tensor  # [k, D]
    features: Tensor  # [k, D']
    tile: Tensor  # [n]: tile of every row that the host makes, no whole number where it is made of several
    fixed: Tensor  # [m] long: rows that are always kept

    def become(self, pieces: Sequence[Sequence[Tensor]]) -> None:
        """Take over what the decisions about all of the rows left."""
        if pieces:
            self.source, self.tokens, self.features = (torch.cat(column) for column in zip(*pieces, strict=True))


Group = list[tuple[ImageRows, Tensor]]  # rows that share one budget: images, and positions [m] within their rows


class Arrangement:
    """The host's arrangement of one pass: maps of the tower's tokens as rows of the prompt."""

    def __init__(self, vision: VisionCuts) -> None:
        self.vision, self.passing, self.tower = vision, vision.passing, vision.tower
        self.kind, self.device = vision.passing.kind, vision.session.device
        self.shape = vision.layout.shape(vision.tower, vision.passing)
        self._made: dict[Any, list[Tensor]] = {}
        late = bool(vision.at(Stage.PROJECTOR))
        self._blurred = self._mixing() if vision.family.tokenwise and late else []
        self.tokenwise = False  # whether a row is one token, which `parts` finds out

    def host(self, maps: Tensor) -> Sequence[Tensor]:
        """Channels of maps, [*shape, C] -> per image [n, C]."""
        return self.vision.family.arrange(maps, self.kind, self.passing.inputs)

    def rows(self, key: Any, maps: Tensor) -> list[Tensor]:
        """A signal of the tower's tokens as rows of the prompt, per image [n] or [n, D]; made once per key."""
        if key not in self._made:
            flat = maps[..., None] if maps.ndim == len(self.shape) else maps
            rows = self.host(flat)
            self._made[key] = [r[..., 0] for r in rows] if flat.ndim > maps.ndim else list(rows)
        return self._made[key]

    def of_image(self, key: Any, maps: Tensor, number: int) -> Tensor:
        """The same of one image."""
        return self.rows(key, maps)[self.passing.batch.index(number)]

    @cached_property
    def units(self) -> dict[int, Tensor]:
        """What goes into the merger for every row that the host makes, by image [n, m D]."""
        made = self.vision.family.units(self.passing.features, self.kind, self.passing.inputs)
        return dict(zip(self.passing.batch, made, strict=True))

    @property
    def middles(self) -> Tensor:
        """The middle of every patch of its tile, [*shape, 2] in (0, 1)."""
        down, across = ((torch.arange(n, device=self.device) + 0.5) / n for n in self.tower.grid)
        return torch.cartesian_prod(down, across).expand(*self.shape, 2)

    def parts(self, features: Sequence[Tensor]) -> list[ImageRows]:
        """The rows of every image, tokens beside features [n, D'] where the projector works token by token."""
        left, parts = self._left(), []
        masks = [(~alive.isnan() & (alive > 0.5), alive.isnan()) for alive, _ in left]
        mixed = [(~alive.isnan() & (alive > WHOLE) & (alive < 1 - WHOLE)).any() for alive, _ in left]
        found = [torch.stack([bad, *(mask.sum() for mask in pair)]) for bad, pair in zip(mixed, masks, strict=True)]
        known = torch.cat([*found, *(each[None].long() for each in self._blurred)]).tolist()
        counts, blurred = [known[3 * n : 3 * n + 3] for n in range(len(left))], known[3 * len(left) :]
        if any(bad for bad, *_ in counts):
            raise PruningError(
                f"{self.vision.at(Stage.PIXELS, Stage.VIT)[0].name}: the model interpolates the tower's output of "
                f"this {self.kind}, so no patch can be dropped before: use a strategy of the projector or llm stage"
            )
        self.tokenwise = bool(self._blurred) and not any(blurred)
        tokens = self.rows("features", self.passing.features) if self.tokenwise else features
        whole = zip(self.passing.batch, features, tokens, left, masks, counts, strict=True)
        for number, rows, seen, (_, tile), (there, newline), (_, k, fixed) in whole:
            source = true_columns(there, k)
            parts.append(ImageRows(number, source, seen[source], rows[source], tile, true_columns(newline, fixed)))
        return parts

    def _left(self) -> list[tuple[Tensor, Tensor]]:
        """Per image and row: the share of its tokens that is left (nan for a newline), and its tile."""
        alive = self.passing.alive
        if alive is None:
            alive = torch.ones(self.shape, dtype=torch.bool, device=self.device)
        tile = self.vision.layout.tile(self.tower, self.passing).to(alive.device)
        return [rows.unbind(-1) for rows in self.host(torch.stack([alive.float(), tile], dim=-1))]

    def _mixing(self) -> list[Tensor]:
        """Per image, whether the host makes rows of several tokens; one that interpolates has projected them before."""
        numbers = torch.arange(math.prod(self.shape), device=self.device).view(self.shape) % 251.0
        means = [rows.unbind(-1) for rows in self.host(torch.stack([numbers, numbers**2], dim=-1))]
        return [(square - mean**2 > MIXED).any() for mean, square in means]

    def groups(self, strategy: PruningStrategy, parts: Sequence[ImageRows]) -> list[Group]:
        """The rows that share one budget."""
        everything = [(part, torch.arange(len(part.source), device=part.source.device)) for part in parts]
        if strategy.budget == "per_image":
            return [[one] for one in everything if len(one[1])]
        if strategy.budget == "per_tile":
            tiles = [(part, part.tile[part.source]) for part in parts]
            if any((of != of.round()).any() for _, of in tiles):
                raise strategy.error(
                    f"budget=per_tile needs whole tiles, the model interpolates across those of this {self.kind}"
                )
            return [[(part, (of == tile).nonzero().flatten())] for part, of in tiles for tile in of.unique()]
        samples = [self.vision.call.images[part.number].sample for part in parts]
        return [[one for one, s in zip(everything, samples, strict=True) if s == sample] for sample in set(samples)]
