"""Rows of the prompt that share one budget, as a strategy is shown them, and which of them are judged at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.facts.image import Image
from vtp_plugin.signals import RowsView, Signal, needed
from vtp_plugin.signals.views import tapped
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.arrangement import Arrangement, Group
from vtp_plugin.surgery.batching import alike
from vtp_plugin.surgery.question import CallQuestions
from vtp_plugin.surgery.vision import space_of

PAIRS = 2**25  # of rows of one image, of all images that are judged at once: what maps of them may take


@dataclass(frozen=True)
class Shown:
    """Rows that share one budget, and what their strategy is shown of them."""

    rows: GroupRows
    found: Mapping[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """What tokens are told beside signals."""
        return {"views": self.rows.images[0].views} if self.found.get("view") is not None else {}

    @property
    def kind(self) -> Any:
        """Groups of one kind can be judged at once."""
        said = [self._said(name, value) for name, value in self.found.items()]
        return len(self.rows.source), self.rows.grid, str(said), str(self.facts)

    @property
    def per_image(self) -> list[str]:
        """The signals that have an entry for every image; others are facts that images of one kind share."""
        return [
            signal.name for signal in needed(self.rows.strategy) if "B" in signal.axes and signal.name in self.found
        ]

    def _said(self, name: str, value: Any) -> Any:
        """What has to be equal of a signal."""
        return value.shape if isinstance(value, Tensor) else type(value) if name in self.per_image else value


def judged_at_once(shown: Sequence[Shown]) -> Iterator[Sequence[Shown]]:
    """Groups that are judged at once: of one kind, and no more than a map of all pairs has room for."""
    for numbers in alike([one.kind for one in shown]):
        most = max(1, PAIRS // max(1, len(shown[numbers[0]].rows.source)) ** 2)
        for start in range(0, len(numbers), most):
            yield [shown[number] for number in numbers[start : start + most]]


class GroupRows(RowsView):
    """The rows of a group, [1, N, ...]."""

    def __init__(self, arrangement: Arrangement, strategy: PruningStrategy, group: Group) -> None:
        self.arrangement, self.strategy, self.group = arrangement, strategy, group
        self.tower, self.device = arrangement.tower, arrangement.device
        self.embedded = strategy.text_encoder == "llm"
        self.images: list[Image] = [arrangement.vision.call.images[part.number] for part, _ in group]
        self.first = group[0][0].number
        self.fingerprint = (self.images[0].fingerprint,)
        self.source = _together([_chosen(part.source, where) for part, where in group])  # [N]

    @property
    def block(self) -> int:
        return self.tower.number(self.strategy.tower_layer)

    @cached_property
    def owner(self) -> Tensor:
        """Which part every row is of, [N]."""
        sizes = [len(part.source) if where is None else len(where) for part, where in self.group]
        return torch.cat([self.source.new_full((size,), n) for n, size in enumerate(sizes)])

    @cached_property
    def tokens(self) -> Tensor:
        """[1, N, D]"""
        return _together([_chosen(part.tokens, where) for part, where in self.group])[None]

    @cached_property
    def projected(self) -> Tensor:
        return _together([_chosen(part.features, where) for part, where in self.group])[None]

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
        pieces = [self.arrangement.units[part.number] for part, _ in self.group]
        return self._of_source(pieces)

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
        tile = part.tiles if where is None or len(where) == len(part.source) else part.tiles[where.cpu()]
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
        return self._of_source([self.arrangement.of_image(key, maps, part.number) for part, _ in self.group])

    def _of_source(self, whole: Sequence[Tensor]) -> Tensor:
        """The rows of the group of values that have one for every row of the host, per part [n, ...]; [1, N, ...]."""
        pairs = zip(whole, self.group, strict=True)
        pieces = [
            values if part.whole and where is None else values[_chosen(part.source, where)]
            for values, (part, where) in pairs
        ]
        return _together(pieces)[None]

    @property
    def _several_views(self) -> bool:
        """Whether the rows are those of one image with several views."""
        return len(self.group) == 1 and self.strategy.budget != "per_tile" and self.images[0].views is not None


def _chosen(values: Tensor, where: Tensor | None) -> Tensor:
    """Values [n, ...] at some places [m]; None: at all of them."""
    return values if where is None else values[where]


def _together(pieces: Sequence[Tensor]) -> Tensor:
    """Pieces [n, ...] one after the other; one alone as it is."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
