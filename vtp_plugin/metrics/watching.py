"""Who went where: the tokens that every part of a model saw in a call.

The tower, its blocks and the projectors are watched (shapes only, read when the call is over), so that merging inside
blocks, windows and unequal tiles are counted as they ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from math import prod
from typing import Any

from torch import Tensor, nn

from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.undo import Undo

PATCH, BLOCK, PROJECTOR = "patch", "block", "projector"


@dataclass
class Ends:
    """What attends to each other in a packed sequence."""

    cumulative: Tensor  # [S + 1]
    lengths: list[int] = field(default_factory=list)  # once the call has ended

    def take(self, cumulative: Tensor) -> None:
        """The same numbers on the host."""
        self.lengths = cumulative.diff().tolist()


@dataclass(frozen=True)
class Seen:
    """One part of the tower in one pass. Rows are tiles, [T, n, D], or one packed sequence, [S, D] or [1, S, D]."""

    part: str
    number: int  # of the block or projector
    entering: tuple[int, int]  # rows and tokens per row
    leaving: tuple[int, int]
    owners: tuple[int, ...]  # image of every tile
    packed: tuple[int, ...]  # what every image in `images` has in it, where rows are no equally long tiles
    images: tuple[int, ...]
    ends: Ends | None  # of a packed sequence

    @property
    def uniform(self) -> bool:
        """Whether its rows are the tiles, equally long ones."""
        return self.ends is None and self.entering[0] == len(self.owners)

    def shares(self) -> Iterator[tuple[int, int, int]]:
        """(image, tokens that entered, tokens that left) of every sequence."""
        if self.uniform:
            for owner in self.owners:
                yield owner, self.entering[1], self.leaving[1]
            return
        total, left = (rows * tokens for rows, tokens in (self.entering, self.leaving))
        if self.ends is None:
            yield from zip(self.images, self._shared(total), self._shared(left), strict=True)
            return
        place, own = 0, self._shared(total)
        for length in self.ends.lengths:
            yield self.images[place], length, length * left // total
            own[place] -= length
            place += own[place] <= 0

    def _shared(self, total: int) -> list[int]:
        """What belongs to no image in particular, shared by what the images have in it; the sum is the total."""
        ends = [total * had // sum(self.packed) for had in accumulate(self.packed, initial=0)]
        return [end - start for start, end in pairwise(ends)]


def watch(pruned: Session, undo: Undo) -> None:
    """Remember the shapes that pass the patch embedding, the tower's blocks and the projectors of every call."""
    tower = pruned.adapter.tower
    parts = [(PATCH, [tower.patch_embedding]), (BLOCK, tower.blocks), (PROJECTOR, pruned.adapter.projectors)]
    for part, modules in parts:
        for number, module in enumerate(modules):
            undo.after(module, _observer(pruned, part, number))


def _observer(pruned: Session, part: str, number: int) -> Any:
    def observe(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = pruned.call
        if call is None or call.tower is None or not call.tower.batch:
            return
        before = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        after = output[0] if isinstance(output, tuple) else output
        leaving = _embedded(after) if part == PATCH else _rows(after)
        entering = leaving if part == PATCH else _rows(before)
        ends, tower = _ends(call, kwargs.get("cu_seqlens")) if part == BLOCK else None, call.tower
        seen = Seen(part, number, entering, leaving, tuple(tower.tiles), (), tuple(tower.batch), ends)
        if not seen.uniform:
            seen = replace(seen, packed=tuple(tower.packed or [_size(call.images[n], part) for n in tower.batch]))
        call.seen.append(seen)

    return observe


def _size(image: Image, part: str) -> int:
    """What an unpruned image has in a part of the tower: tokens for the projector, patches everywhere else."""
    return (image.projectable if part == PROJECTOR else 0) or image.patches or image.total


def _ends(call: Call, cumulative: Tensor | None) -> Ends | None:
    """One object per tensor, however many blocks are given it."""
    if cumulative is None:
        return None
    known = next((seen.ends for seen in reversed(call.seen) if seen.ends and seen.ends.cumulative is cumulative), None)
    if known is None:
        known = Ends(cumulative)
        call.afterwards(cumulative, known.take)
    return known


def _embedded(tensor: Tensor) -> tuple[int, int]:
    """Rows and tokens per row of what a patch embedding makes, [B, D, rows, columns], [B, N, D] or [S, D]."""
    shape = tensor.shape
    return (shape[0], prod(shape[2:])) if len(shape) == 4 else _rows(tensor)


def _rows(tensor: Tensor | list[Tensor]) -> tuple[int, int]:
    """Rows and tokens per row of [B, N, D], [B, rows, columns, D] or [S, D], or of [n, D] per image."""
    if isinstance(tensor, list):
        return 1, sum(map(len, tensor))
    shape = tensor.shape
    return (shape[0], prod(shape[1:-1])) if len(shape) > 2 else (1, shape[0])
