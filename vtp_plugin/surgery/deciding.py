"""What is decided between two decoder layers: per image, which columns of the prompt are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.facts.image import Image
from vtp_plugin.signals import LayerView, found_in
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.cut import Cut, equalised
from vtp_plugin.surgery.reading import Reading
from vtp_plugin.surgery.session import Session
from vtp_plugin.tokens import true_columns


@dataclass(frozen=True, eq=False)
class Seen:
    """What is there where layer `number` begins, in the first pass over a prompt."""

    number: int
    hidden: Tensor  # [B, L, D]
    before: Cut  # the columns of the prompt that are still there
    reading: Reading | None  # the attention of the layer before, where a signal reads it
    read_behind: Callable[[Tensor, Cut], Reading]

    @cached_property
    def behind(self) -> Reading:
        """The attention of this layer, as if nothing were cut."""
        return self.read_behind(self.hidden, self.before)

    def where(self, row: int, image: Image) -> Tensor:
        """The columns of an image [N] among those that are still there in a row of the batch."""
        return torch.searchsorted(self.before.columns[row].contiguous(), image.columns)


def decide(session: Session, call: Call, strategies: Sequence[PruningStrategy], depth: int, seen: Seen) -> Cut:
    """Ask the strategies of one layer, in a model of `depth` layers, about every image of the call."""
    rows = len(seen.hidden) // len(call.valid)  # beams and returned sequences repeat a sample
    keep, counts, merged = seen.before.valid.clone(), list(seen.before.counts), []
    text = Text(call, seen.before, rows)
    for strategy in strategies:
        cuts = strategy.cut_layers(depth)
        for number, image in enumerate(call.images):
            if image.columns is None or len(image.columns) == 0:
                continue
            row = image.sample * rows
            image.columns = image.columns.to(seen.hidden.device)
            where, first = seen.where(row, image), image.entering.setdefault(strategy.name, image.columns)
            with session.judging(strategy, layer=seen.number) as cut:
                view = _view(session, call, seen, image, row, where, text, first)
                facts = {"cut": (cuts.index(seen.number), len(cuts)), "entered": len(first)}
                grid = image.grid or session.adapter.tower.grid
                selection = cut.decide(seen.hidden[row, where][None], [number], grid, _read(strategy, view), **facts)
            columns = selection.sources[0]
            if selection.tokens is not None:
                merged.append((slice(row, row + rows), image.columns[columns], selection.tokens[0]))
            keep[row : row + rows].index_fill_(1, where, False).index_fill_(1, where[columns], True)
            for copy in range(row, row + rows):
                counts[copy] -= len(where) - len(columns)
            image.columns = image.columns[columns]
    if len(strategies) > 1:
        merged = [_still(seen.before, keep, *one) for one in merged]
    return equalised(seen.before, keep, counts, merged, compact=session.positions.layers[seen.number] == "compact")


def _still(before: Cut, keep: Tensor, rows: slice, columns: Tensor, values: Tensor) -> tuple[slice, Tensor, Tensor]:
    """Merged columns [M] and values [M, D] without what a later strategy of the same layer dropped."""
    left = keep[rows.start, torch.searchsorted(before.columns[rows.start].contiguous(), columns)]
    return rows, columns[left], values[left]


def _view(
    session: Session, call: Call, seen: Seen, image: Image, row: int, where: Tensor, text: Text, first: Tensor
) -> LayerView:
    """What signals of an image at the columns `where` [N] are read from; `text` finds those of the question."""
    device, entry = seen.hidden.device, call.prompt.entry
    return LayerView(
        before=seen.reading,
        behind=lambda: seen.behind,
        embeddings=None if entry is None else entry.to(device),
        hidden=seen.hidden,
        norm=session.adapter.language_model.norm.forward,
        sample=row,
        image=where,
        find_text=lambda: text.of(row),
        first=first.to(device),
        columns=seen.before.columns[row],
        fingerprint=(image.fingerprint,),
    )


def _read(strategy: PruningStrategy, view: LayerView) -> dict[str, Any]:
    """The signals of one image, with an axis in front."""
    with torch.no_grad():
        found = found_in(strategy, view)
    return {name: value[None] if isinstance(value, Tensor) else value for name, value in found.items()}


class Text:
    """The columns behind the first image that belong to no image; at least the last real one of every row.

    Cuts take none of them away, so a row is asked for its text once per call, all rows together; only where a row has
    other columns among those of an image, or no text at all, the next cut may see another text.
    """

    def __init__(self, call: Call, before: Cut, rows: int) -> None:
        self.call, self.before, self.rows = call, before, rows
        self.images = [(image.sample * rows, image.columns) for image in call.images if image.columns is not None]

    def of(self, row: int) -> Tensor:
        """Of one row of the batch, [T] among the columns that are still there."""
        words = self.call.prompt.words
        if row not in words:
            return self._found[row]
        columns = self.before.columns[row].contiguous()
        return torch.searchsorted(columns, words[row].to(columns.device))

    @cached_property
    def _found(self) -> dict[int, Tensor]:
        text, mixed = self._marked()
        counts = torch.stack([text.sum(1), mixed]).tolist()
        found = {row: true_columns(own, count) for row, (own, count) in enumerate(zip(text, counts[0], strict=True))}
        fixed = {row: self.before.columns[row, own] for row, own in found.items() if not counts[1][row]}
        self.call.prompt.words.update(fixed)
        return found

    def _marked(self) -> tuple[Tensor, Tensor]:
        """The text [B, L] bool, and whether the next cut may see another one [B]."""
        before = self.before
        text, column = before.valid.clone(), torch.arange(before.valid.shape[1], device=before.valid.device)
        last, ends = (before.valid * (column + 1)).argmax(1), []
        for row, columns in self.images:
            if len(columns) == 0:
                continue
            sample = slice(row, row + self.rows)
            where = torch.searchsorted(before.columns[row].contiguous(), columns.to(text.device))
            text[sample].index_fill_(1, where, False)
            text[sample] &= column > where.min()
            ends.append((sample, where.max()))
        mixed = ~text.any(1)
        for sample, end in ends:
            mixed[sample] |= (text[sample] & (column < end)).any(1)
        text = text.scatter(1, last[:, None], text.gather(1, last[:, None]) | ~text.any(1, keepdim=True))
        return text, mixed
