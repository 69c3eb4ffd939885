"""The caller speaks in columns of its own prompt, whatever was cut: the one translation between those and ours.

`Columns` says which columns of the caller's prompt a shorter one holds. What comes in by column (ids, masks, labels,
token types) is taken, what goes out by column (logits, hidden states, attentions) is put back, zero where a token was
dropped. Columns that were appended behind the prompt stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.errors import PruningError
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.batching import alike
from vtp_plugin.tokens import true_columns

IGNORED = -100  # the label that losses of transformers leave out, unless their ignore_index is another


@dataclass(frozen=True)
class Rows:
    """Which of an image's feature rows are left, in the order in which they are served."""

    source: Tensor  # [K] long: number of the row among those that the host makes, -1 for a row that is none of them
    judged: Tensor | None = None  # [K] bool: False for a row that no strategy may drop (a newline); None: all may be
    fixed: int = 0  # how many are no such rows
    ordered: bool = False  # they are rows of the host's, ascending, as far as the host knows

    def only_judged(self, values: Tensor) -> Tensor:
        """Of values [K, ...] those of rows that a strategy may drop."""
        return values[true_columns(self.judged, len(values) - self.fixed)] if self.fixed else values

    @staticmethod
    def every_judged(left: Sequence[Rows], values: Sequence[Tensor]) -> list[Tensor]:
        """`only_judged` of several images, alike ones at once: values [K] each."""
        found = dict(enumerate(values))
        for numbers in alike([(rows.fixed, len(rows.source)) for rows in left]):
            first = left[numbers[0]]
            if first.fixed:
                judged = torch.stack([left[n].judged for n in numbers])
                columns = true_columns(judged, len(first.source) - first.fixed)
                found |= zip(numbers, torch.stack([values[n] for n in numbers]).gather(1, columns), strict=True)
        return [found[number] for number in range(len(values))]

    def to(self, device: torch.device) -> Rows:
        """The same next to the prompt, which may live on another device than the tower."""
        if self.source.device == device:
            return self
        judged = None if self.judged is None else self.judged.to(device)
        return replace(self, source=self.source.to(device), judged=judged)


def slots(source: Tensor, total: int) -> Tensor:
    """The placeholders that hold rows `source` [G, K] of G images, of `total` each: [G, K] ascending.

    Those of the rows themselves, and the first free ones for rows that are none of the host's.
    """
    own = torch.zeros(len(source), total + 1, dtype=torch.bool, device=source.device)
    own.scatter_(1, torch.where(source >= 0, source, total), True)
    return true_columns(own[:, :total], source.shape[1]).sort(-1).values


@dataclass(frozen=True)
class Columns:
    """What is left of prompts of `length` columns."""

    columns: Tensor  # [B, L'] long, ascending: column of the caller's prompt, -1 for padding
    length: int  # of the caller's prompt
    origin: Tensor | None = None  # [B, L'] long: the column whose position a token has, where it is not its own
    padded: bool | None = None  # whether there is padding; None: the device knows
    tail: int = 0  # at least so many of the caller's last columns are the last ones here, in every row

    @classmethod
    def of(cls, wanted: Tensor, counts: Sequence[int], left: bool, tail: int) -> Columns:
        """The wanted columns [B, L], `counts` of them, padded on the given side to the longest row."""
        longest = max(counts)
        columns = true_columns(wanted, longest)
        if min(counts) < longest:
            number = wanted.sum(1, keepdim=True)
            place = torch.arange(longest, device=wanted.device) - (longest - number) * left  # [B, longest]
            inside = (place >= 0) & (place < number)
            columns = torch.where(inside, columns.gather(1, place.clamp(min=0)), -1)
        return cls(columns, wanted.shape[1], padded=min(counts) < longest, tail=tail)

    def places(self, wanted: Tensor) -> Tensor:
        """Where every wanted column [B, L] is among ours, [B, L] long; of a column that is not, no matter what."""
        counted = wanted.cumsum(1) - 1
        if not self.padded:
            return counted
        padding = self.columns < 0
        return counted + padding.sum(1, keepdim=True) * padding[:, :1]  # where it is in front

    @classmethod
    def whole(cls, rows: int, length: int, device: torch.device) -> Columns:
        """Every column of prompts that nothing was taken from."""
        return cls(torch.arange(length, device=device).expand(rows, -1), length, padded=False, tail=length)

    @property
    def full(self) -> bool:
        """Whether there is no padding."""
        return bool(self.valid.all()) if self.padded is None else not self.padded

    @property
    def valid(self) -> Tensor:
        """[B, L'] bool: no padding."""
        return self.columns >= 0

    @property
    def short(self) -> int:
        """How many columns are left."""
        return self.columns.shape[1]

    def to(self, device: torch.device) -> Columns:
        """The same on another device."""
        origin = None if self.origin is None else self.origin.to(device)
        return replace(self, columns=self.columns.to(device), origin=origin)

    def repeated(self, rows: int) -> Columns:
        """For beams and returned sequences, which repeat every row."""
        times = rows // len(self.columns)
        if times * len(self.columns) != rows:
            raise PruningError(f"{rows} rows do not belong to a prompt of {len(self.columns)}")
        if times == 1:
            return self
        origin = None if self.origin is None else self.origin.repeat_interleave(times, 0)
        return replace(self, columns=self.columns.repeat_interleave(times, 0), origin=origin)

    def of_rows(self, rows: Tensor) -> Columns:
        """The same of some rows [n]."""
        origin = None if self.origin is None else self.origin[rows]
        return replace(self, columns=self.columns[rows], origin=origin)

    def followed(self, new: int) -> Columns:
        """The same with `new` columns behind the prompt, all of which are there."""
        if new == 0:
            return self
        behind = torch.arange(self.length, self.length + new, device=self.columns.device).expand(len(self.columns), -1)
        origin = None if self.origin is None else torch.cat([self.origin, behind], 1)
        columns = torch.cat([self.columns, behind], 1)
        return replace(self, columns=columns, length=self.length + new, origin=origin, tail=self.tail + new)

    def within(self, columns: Tensor, valid: Tensor) -> Columns:
        """What a later cut leaves of it: `columns` [B, K] of ours, where `valid` [B, K]."""
        return Columns(torch.where(valid, self.columns.gather(1, columns), -1), self.length)

    def take(self, tensor: Tensor, padding: Any, dim: int = 1) -> Tensor:
        """The columns of a tensor [B, ...] that has the caller's along `dim`, with `padding` where there is none."""
        moved = tensor.movedim(dim, 1)
        if self.padded is False:
            return attention.take(moved, self.columns).movedim(1, dim)
        valid = self.valid.view(*self.columns.shape, *[1] * (moved.ndim - 2))
        taken = torch.where(valid, attention.take(moved, self.columns.clamp(min=0)), padding)
        return taken.movedim(1, dim)

    def put(self, short: Tensor, dim: int = 1) -> Tensor:
        """A tensor [B, ...] with our columns along `dim` at the caller's; zero where there is none.

        The tensor itself where nothing is missing, so that who asks for its gradient gets it.
        """
        if self.short == self.length and self.full:
            return short
        moved = short.movedim(dim, 1)
        full = moved.new_zeros(len(moved), self.length + 1, *moved.shape[2:])  # padding goes behind it
        columns = self.columns.to(moved.device)
        columns = torch.where(columns >= 0, columns, self.length).view(*columns.shape, *[1] * (moved.ndim - 2))
        return full.scatter(1, columns.expand_as(moved), moved)[:, : self.length].movedim(1, dim)

    def mask(self, given: Any, queries: int) -> Any:
        """A mask for `queries` columns at the end, of the form that the caller gave: [B, S], [B, 1, Q, S], by layer."""
        if isinstance(given, Mapping):
            return {kind: self.mask(mask, queries) for kind, mask in given.items()}
        if not isinstance(given, Tensor) or given.ndim not in (2, 4):
            raise PruningError(f"pruning cannot shorten an attention mask of the type {type(given).__name__}")
        if given.shape[-1] != self.length:
            raise PruningError(
                f"the attention mask has {given.shape[-1]} columns, prompt and new tokens have {self.length}: it "
                f"speaks of the whole prompt, whatever was cut"
            )
        if given.ndim == 2:
            return self.take(given, 0)
        hidden = False if given.dtype is torch.bool else torch.finfo(given.dtype).min
        given = self.take(given.expand(len(self.columns), -1, -1, -1), hidden, 3)
        if queries < self.short:
            return given
        own = torch.eye(self.short, dtype=torch.bool, device=given.device) & ~self.valid[:, None, None].to(given.device)
        return torch.where(own, True if given.dtype is torch.bool else 0, self.take(given, hidden, 2))
