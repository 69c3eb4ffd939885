"""The way from a tower's tokens to rows of the prompt, as the host itself arranges them.

Which tokens a row is made of is never computed twice: signals travel through the host's own arrangement as extra
channels (`arrange`), so a row of several tokens gets the mean of their signals. What follows from the sizes of the
images alone (which token is which row, where newlines are) travels on the CPU, so that nobody waits for the device.
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
from vtp_plugin.surgery.batching import moved
from vtp_plugin.surgery.vision import VisionCuts

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

        A row that is made of no token (a newline) is nan. Maps may live on any device, as rows do then.
        """


@dataclass
class ImageRows:
    """The rows of one image that a projector-stage strategy may still drop."""

    number: int  # of the image within the call
    source: Tensor  # [k] long: row among those that the host makes, -1 for a merged one that is none of them
    tokens: Tensor  # [k, D]
    features: Tensor  # [k, D']
    tile: Tensor  # on the host, [n]: tile of every row that the host makes, no whole number where several make it
    fixed: Tensor  # [m] long: rows that are always kept
    known: Tensor | None  # `source` on the host, as long as nothing was decided
    whole: bool = False  # `source` are all rows that the host makes
    ordered: bool = True  # as the host orders them; not for sure where rows were merged or tiles judged one by one

    @property
    def tiles(self) -> Tensor:
        """The tile of every row that is left, on the host [k]."""
        return self.tile[self.source.cpu() if self.known is None else self.known]

    def become(self, pieces: Sequence[Sequence[Tensor]]) -> None:
        """Take over what the decisions about all of the rows left."""
        if pieces:
            joined = (column[0] if len(column) == 1 else torch.cat(column) for column in zip(*pieces, strict=True))
            self.source, self.tokens, self.features = joined
            self.known, self.whole = None, False
            self.ordered &= len(pieces) == 1  # tiles are not in the host's order


Group = list[tuple[ImageRows, Tensor | None]]  # rows that share one budget: images, and which [m] of theirs; None: all


class Arrangement:
    """The host's arrangement of one pass: maps of the tower's tokens as rows of the prompt."""

    def __init__(self, vision: VisionCuts) -> None:
        self.vision, self.passing, self.tower = vision, vision.passing, vision.tower
        self.kind, self.device = vision.passing.kind, vision.session.device
        self.shape = vision.layout.shape(vision.tower, vision.passing)
        self._made: dict[Any, list[Tensor]] = {}
        wanted = vision.family.tokenwise and vision.at(Stage.PROJECTOR)
        self._numbers = self._counted() if wanted else None  # on the host, the token of every row [n], -1: a newline
        self.left = self._left()

    @property
    def tokenwise(self) -> bool:
        """Whether a row is one token, and strategies see tokens of the tower."""
        return self._numbers is not None

    @cached_property
    def _tokens(self) -> list[Tensor]:
        """`_numbers` next to the model."""
        return list(moved(self._numbers, self.device))

    def host(self, maps: Tensor) -> Sequence[Tensor]:
        """Channels of maps, [*shape, C] -> per image [n, C]."""
        return self.vision.family.arrange(maps, self.kind, self.passing.inputs)

    def rows(self, key: Any, maps: Tensor) -> list[Tensor]:
        """A signal of the tower's tokens as rows of the prompt, per image [n] or [n, D]; made once per key."""
        if key not in self._made:
            flat = maps[..., None] if maps.ndim == len(self.shape) else maps
            rows = self._of_tokens(flat, self._tokens) if self.tokenwise else self.host(flat)
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
        every, sizes = torch.cat([alive for alive, _ in self.left]), [len(alive) for alive, _ in self.left]
        if ((every > WHOLE) & (every < 1 - WHOLE)).any():
            raise PruningError(
                f"{self.vision.at(Stage.PIXELS, Stage.VIT)[0].name}: the model interpolates the tower's output of "
                f"this {self.kind}, so no patch can be dropped before: use a strategy of the projector or llm stage"
            )
        tokens = self.rows("features", self.passing.features) if self.tokenwise else features
        known = list(zip(_places(every > 0.5, sizes), _places(every.isnan(), sizes), strict=True))
        there = iter(moved(sum(known, ()), features[0].device if len(features) else self.device))
        whole = zip(self.passing.batch, features, tokens, self.left, known, strict=True)
        return [
            _rows_of(number, rows, seen, tile, next(there), next(there), on_host)
            for number, rows, seen, (_, tile), (on_host, _) in whole
        ]

    def _left(self) -> list[tuple[Tensor, Tensor]]:
        """On the host, per image and row: the share of its tokens that is left (nan for a newline), and its tile."""
        alive = self.passing.alive
        alive = torch.ones(self.shape) if alive is None else alive.cpu().float()
        maps = torch.stack([alive, self.vision.layout.tile(self.tower, self.passing)], dim=-1)
        rows = self._on_host(maps) if self._numbers is None else self._of_tokens(maps, self._numbers)
        return [row.unbind(-1) for row in rows]

    def _counted(self) -> list[Tensor] | None:
        """`_numbers`; None if the host makes rows of several tokens: who interpolates has projected them before."""
        numbers = torch.arange(math.prod(self.shape)).view(self.shape).float()
        maps = torch.stack([numbers, numbers % 251, (numbers % 251) ** 2], dim=-1)
        made = self._on_host(maps)
        number, mean, square = torch.cat(list(made)).unbind(-1)
        if (square - mean**2 > MIXED).any():
            return None
        return list(number.nan_to_num(nan=-1.0).long().split([len(rows) for rows in made]))

    def _of_tokens(self, maps: Tensor, numbers: Sequence[Tensor]) -> list[Tensor]:
        """Maps [*shape, C] of tokens that are rows, one by one, `numbers` [n] of them per image."""
        flat = maps.flatten(0, len(self.shape) - 1)
        newline = flat.new_full((1, *flat.shape[1:]), float("nan"))
        flat = torch.cat([flat, newline])  # which is the last, number -1
        return [flat[number.to(flat.device)] for number in numbers]

    def _on_host(self, maps: Tensor) -> list[Tensor]:
        """The arrangement of what is on the host; a host that computes on its own device is waited for."""
        return [rows.cpu() for rows in self.host(maps)]

    def groups(self, strategy: PruningStrategy, parts: Sequence[ImageRows]) -> list[Group]:
        """The rows that share one budget."""
        if strategy.budget == "per_tile":
            return self._by_tile(strategy, parts)
        everything: list[tuple[ImageRows, Tensor | None]] = [(part, None) for part in parts]
        if strategy.budget == "per_image":
            return [[one] for one in everything if len(one[0].source)]
        samples = [self.vision.call.images[part.number].sample for part in parts]
        return [[one for one, s in zip(everything, samples, strict=True) if s == sample] for sample in set(samples)]

    def _by_tile(self, strategy: PruningStrategy, parts: Sequence[ImageRows]) -> list[Group]:
        tiles = [(part, part.tiles) for part in parts]
        if any((of != of.round()).any() for _, of in tiles):
            raise strategy.error(
                f"budget=per_tile needs whole tiles, the model interpolates across those of this {self.kind}"
            )
        found = [(part, (of == tile).nonzero().flatten()) for part, of in tiles for tile in of.unique()]
        there = moved([where for _, where in found], parts[0].source.device if parts else self.device)
        return [[(part, where)] for (part, _), where in zip(found, there, strict=True)]


def _places(wanted: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Where every image's part of `wanted` [n] is True, per image [k]."""
    return [own.nonzero().flatten() for own in wanted.split(sizes)]


def _rows_of(
    number: int, features: Tensor, tokens: Tensor, tile: Tensor, source: Tensor, fixed: Tensor, known: Tensor
) -> ImageRows:
    """The rows `source` of an image of which the host makes `features` [n, D']."""
    if len(known) == len(features):
        return ImageRows(number, source, tokens, features, tile, fixed, known, whole=True)
    return ImageRows(number, source, tokens[source], features[source], tile, fixed, known)
