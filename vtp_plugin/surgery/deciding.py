"""What is decided between two decoder layers: per image, which columns of the prompt are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.facts.image import Image
from vtp_plugin.signals import LayerView, found_in, needed
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.batching import alike, joined
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.cut import Cut, equalised
from vtp_plugin.surgery.reading import Reading
from vtp_plugin.surgery.session import Session
from vtp_plugin.tokens import last_true, true_columns


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

    def where(self, rows: Sequence[int], columns: Tensor) -> Tensor:
        """Columns [G, N] of the prompts in these rows of the batch, among those that are still there."""
        there = self.before.columns
        there = there if self._all(rows) else torch.stack([there[row] for row in rows])
        return torch.searchsorted(there.contiguous(), columns)

    def tokens(self, rows: Sequence[int], where: Tensor) -> Tensor:
        """The hidden states at columns [G, N] of these rows, [G, N, D]."""
        if self._all(rows):
            return attention.take(self.hidden, where)
        return torch.stack([self.hidden[row, own] for row, own in zip(rows, where, strict=True)])

    def mark(self, keep: Tensor, rows: Sequence[int], times: int, where: Tensor, left: Sequence[Tensor]) -> None:
        """Take columns `where` [G, N] of these rows, `times` copies each, out of keep [B, L], all but `left`."""
        if self._all(rows) and len({len(own) for own in left}) == 1:
            keep.scatter_(1, where, False).scatter_(1, torch.stack(list(left)), True)
            return
        for row, gone, own in zip(rows, where, left, strict=True):
            keep[row : row + times].index_fill_(1, gone, False).index_fill_(1, own, True)

    def _all(self, rows: Sequence[int]) -> bool:
        """Whether these are the rows of the batch, one after the other."""
        return list(rows) == list(range(len(self.hidden)))


def decide(session: Session, call: Call, strategies: Sequence[PruningStrategy], depth: int, seen: Seen) -> Cut:
    """Ask the strategies of one layer, in a model of `depth` layers, about every image of the call."""
    times = len(seen.hidden) // len(call.valid)  # beams and returned sequences repeat a sample
    keep, counts, merged = seen.before.valid.clone(), list(seen.before.counts), []
    text = Text(call, seen.before, times)
    for strategy in strategies:
        cuts = strategy.cut_layers(depth)
        for numbers in _together(call, strategy):
            images = [call.images[number] for number in numbers]
            rows = [image.sample * times for image in images]
            columns = torch.stack([image.columns.to(seen.hidden.device) for image in images])  # [G, N]
            where, first = seen.where(rows, columns), []
            for image, own in zip(images, columns, strict=True):
                first.append(image.entering.setdefault(strategy.name, own))
            with session.judging(strategy, layer=seen.number) as cut:
                shown = zip(images, rows, where, first, strict=True)
                read = [_read(strategy, _view(session, call, seen, text, *one)) for one in shown]
                found = {name: joined([own[name] for own in read]) for name in read[0]}
                facts = {"cut": (cuts.index(seen.number), len(cuts)), "entered": len(first[0])}
                grid = images[0].grid or session.adapter.tower.grid
                selection = cut.decide(seen.tokens(rows, where), numbers, grid, found, **facts)
            for image, row, own in zip(images, rows, selection.taken(columns), strict=True):
                image.columns, lost = own, columns.shape[1] - len(own)
                counts[row : row + times] = [count - lost for count in counts[row : row + times]]
            seen.mark(keep, rows, times, where, selection.taken(where))
            if selection.tokens is not None:
                values = zip(images, rows, selection.tokens, strict=True)
                merged += [(slice(row, row + times), image.columns, new) for image, row, new in values]
    if len(strategies) > 1:
        merged = [_still(seen.before, keep, *one) for one in merged]
    return equalised(seen.before, keep, counts, merged, compact=session.positions.layers[seen.number] == "compact")


def _together(call: Call, strategy: PruningStrategy) -> list[list[int]]:
    """The numbers of images that are judged at once: alike, where a signal is no more than a number per token."""
    there = [n for n, image in enumerate(call.images) if image.columns is not None and len(image.columns)]
    if strategy.merges or not all(signal.narrow for signal in needed(strategy)):
        return [[number] for number in there]

    def facts(image: Image) -> tuple[Any, ...]:
        return len(image.columns), image.grid, len(image.entering.get(strategy.name, image.columns))

    return [[there[place] for place in group] for group in alike([facts(call.images[n]) for n in there])]


def _still(before: Cut, keep: Tensor, rows: slice, columns: Tensor, values: Tensor) -> tuple[slice, Tensor, Tensor]:
    """Merged columns [M] and values [M, D] without what a later strategy of the same layer dropped."""
    left = keep[rows.start, torch.searchsorted(before.columns[rows.start].contiguous(), columns)]
    return rows, columns[left], values[left]


def _view(
    session: Session, call: Call, seen: Seen, text: Text, image: Image, row: int, where: Tensor, first: Tensor
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
        last, ends = last_true(before.valid), []
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
