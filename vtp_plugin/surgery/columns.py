"""The caller speaks in columns of its own prompt, whatever was cut: the one translation between those and ours.

`Columns` says which columns of the caller's prompt a shorter one holds. What comes in by column (ids, masks, labels,
token types) is taken, what goes out by column (logits, hidden states, attentions) is put back, zero where a token was
dropped. Columns that were appended behind the prompt stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.errors import PruningError
from vtp_plugin.surgery import attention

IGNORED = -100  # the label that every loss of transformers leaves out


@dataclass(frozen=True)
class Rows:
    """Which of an image's feature rows are left, in the order in which they are served."""

    source: Tensor  # [K] long: number of the row among those that the host makes, -1 for a row that is none of them
    judged: Tensor  # [K] bool: False for a row that no strategy may drop (a newline)

    @property
    def slots(self) -> Tensor:
        """The placeholders that hold the rows, [K] ascending: their own, and the first free ones for the others."""
        own = self.source[self.source >= 0].unique()
        spare = torch.arange(len(self.source) + len(own), device=own.device)
        spare = spare[~torch.isin(spare, own)][: len(self.source) - len(own)]
        return torch.cat([own, spare]).sort().values

    def to(self, device: torch.device) -> Rows:
        """The same next to the prompt, which may live on another device than the tower."""
        return Rows(self.source.to(device), self.judged.to(device))


@dataclass(frozen=True)
class Columns:
    """What is left of prompts of `length` columns."""

    columns: Tensor  # [B, L'] long, ascending: column of the caller's prompt, -1 for padding
    length: int  # of the caller's prompt
    origin: Tensor | None = None  # [B, L'] long: the column whose position a token has, where it is not its own

    @classmethod
    def of(cls, keep: Tensor, real: Tensor, left: bool) -> Columns:
        """Keep columns [B, L] that are wanted and real, padded on the given side to the longest row."""
        rows = [row.nonzero().flatten() for row in keep & real]
        columns = keep.new_full((len(rows), max(map(len, rows))), -1, dtype=torch.long)
        for target, row in zip(columns, rows, strict=True):
            target[len(target) - len(row) :] = row if left else target[len(target) - len(row) :]
            target[: len(row)] = target[: len(row)] if left else row
        return cls(columns, keep.shape[1])

    @classmethod
    def whole(cls, rows: int, length: int, device: torch.device) -> Columns:
        """Every column of prompts that nothing was taken from."""
        return cls(torch.arange(length, device=device).expand(rows, -1), length)

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

    def followed(self, new: int) -> Columns:
        """The same with `new` columns behind the prompt, all of which are there."""
        if new == 0:
            return self
        behind = torch.arange(self.length, self.length + new, device=self.columns.device).expand(len(self.columns), -1)
        origin = None if self.origin is None else torch.cat([self.origin, behind], 1)
        return Columns(torch.cat([self.columns, behind], 1), self.length + new, origin)

    def within(self, columns: Tensor, valid: Tensor) -> Columns:
        """What a later cut leaves of it: `columns` [B, K] of ours, where `valid` [B, K]."""
        return Columns(torch.where(valid, self.columns.gather(1, columns), -1), self.length)

    def take(self, tensor: Tensor, padding: Any, dim: int = 1) -> Tensor:
        """The columns of a tensor [B, ...] that has the caller's along `dim`, with `padding` where there is none."""
        moved = tensor.movedim(dim, 1)
        valid = self.valid.view(*self.columns.shape, *[1] * (moved.ndim - 2))
        taken = torch.where(valid, attention.take(moved, self.columns.clamp(min=0)), padding)
        return taken.movedim(1, dim)

    def put(self, short: Tensor, dim: int = 1) -> Tensor:
        """A tensor [B, ...] with our columns along `dim` at the caller's; zero where there is none."""
        moved = short.movedim(dim, 1)
        full = moved.new_zeros(len(moved), self.length, *moved.shape[2:])
        columns = self.columns.to(moved.device)
        row, column = (columns >= 0).nonzero(as_tuple=True)
        full[row, columns[row, column]] = moved[row, column]
        return full.movedim(1, dim)

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
