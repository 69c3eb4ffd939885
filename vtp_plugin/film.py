"""Videos for methods that compare frames: tokens laid out by frame and place, and what such methods have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vtp_plugin.strategy import ComparingStrategy
from vtp_plugin.tokens import VisualTokens


@dataclass(frozen=True)
class Film:
    """Where the N tokens of one video are among its F frames of P places each; a cut in the tower leaves places empty.

    A picture is a video of one frame.
    """

    frames: int
    places: int
    slot: Tensor  # [N] long: frame * P + place

    @classmethod
    def of(cls, visual: VisualTokens) -> Iterator[Film]:
        """One for each image, from the signals `film`, `frame` and `cell`."""
        frames, rows, columns = visual.film
        down, across = visual.cell.unbind(-1)
        for slot in (visual.frame * rows + down) * columns + across:
            yield cls(frames, rows * columns, slot)

    def laid(self, values: Tensor, empty: float = 0) -> Tensor:
        """Values of tokens [N, ...] by frame and place, [F, P, ...]."""
        table = values.new_full((self.frames * self.places, *values.shape[1:]), empty)
        return table.index_copy(0, self.slot, values).unflatten(0, (self.frames, self.places))

    def read(self, table: Tensor) -> Tensor:
        """What stands by frame and place [F, P, ...], of the tokens, [N, ...]."""
        return table.flatten(0, 1)[self.slot]

    @property
    def there(self) -> Tensor:
        """Which places have a token, [F, P] bool."""
        return self.laid(torch.ones_like(self.slot, dtype=torch.bool))


@dataclass(kw_only=True)
class VideoStrategy(ComparingStrategy):
    """A method that divides one budget over the frames of a video, and keeps the positions of tokens."""

    pictures = False
    default_positions = "original"

    def validate(self) -> None:
        self.check("budget", self.budget == "per_image", "must be per_image: the method divides it over the frames")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("film", "frame", "cell", *self.reads())

    def images(self, visual: VisualTokens) -> Iterator[tuple[Tensor, Film]]:
        """The features [N, D] by which the tokens of every video are compared, fp32, and where these are."""
        yield from zip(self.judged(visual, visual.tokens).float(), Film.of(visual), strict=True)
