"""Which columns of a prompt a decoder layer still sees, and the host's masks over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtp_plugin.surgery import attention
from vtp_plugin.surgery.positions import Numbering


@dataclass(frozen=True, eq=False)
class Cut:
    """Columns of the prompt that layers from here on still see."""

    columns: Tensor  # [B, K] ascending
    valid: Tensor  # [B, K] bool: False for padding, and for columns kept only to make the rows equally long
    length: int  # columns of the whole prompt
    counts: tuple[int, ...]  # [B] of them valid, on the host
    merged: tuple[tuple[slice, Tensor, Tensor], ...] = ()  # rows, columns [M] of the prompt, their new values [M, D]
    numbering: Numbering | None = None  # positions, where they are not those of the whole prompt
    everything: bool = False  # nothing was dropped here or before

    def to(self, device: torch.device) -> Cut:
        """The same next to a layer that lives on another device; merged values travel with the hidden states."""
        if self.columns.device == device:
            return self
        numbering = self.numbering and self.numbering.to(device)
        return replace(self, columns=self.columns.to(device), valid=self.valid.to(device), numbering=numbering)

    def of_rows(self, rows: Sequence[int], total: int) -> Cut:
        """The same of these rows of the `total` that a cache has, where beams may share one of ours."""
        rows = [row * len(self.columns) // total for row in rows]
        numbering = self.numbering and self.numbering.of_rows(rows)
        counts, own = (
            tuple(self.counts[row] for row in rows),
            {"columns": self.columns[rows], "valid": self.valid[rows]},
        )
        return replace(self, **own, counts=counts, merged=(), numbering=numbering)

    @property
    def whole(self) -> bool:
        """Whether every column may be attended to."""
        return min(self.counts) == self.columns.shape[1]


def equalised(
    before: Cut,
    keep: Tensor,
    counts: Sequence[int],
    merged: Sequence[tuple[slice, Tensor, Tensor]],
    *,
    compact: bool,
) -> Cut:
    """The kept columns, `counts` [B] of them; shorter rows are filled up with columns that nobody will attend to.

    Every merged column is among those that are kept.
    """
    same = tuple(counts) == before.counts  # nothing dropped: as it was, padding included
    longest = before.columns.shape[1] if same else max(counts)
    spare = torch.where(keep, 2, (~before.valid).int())  # kept first, then padding, then dropped columns
    chosen = spare.sort(dim=1, descending=True, stable=True).indices[:, :longest].sort(dim=1).values
    columns = before.columns.gather(1, chosen)
    valid, numbering = keep.gather(1, chosen), before.numbering
    if compact:
        numbering = Numbering.counted(valid, before.valid.sum(1), numbering)
    elif numbering is not None:
        numbering = numbering.taken(chosen)
    return Cut(columns, valid, before.length, tuple(counts), tuple(merged), numbering, same and before.everything)


def with_new(columns: Tensor, length: int, total: int) -> Tensor:
    """The columns and everything that was appended behind the prompt since, [B, K + new]."""
    new = torch.arange(length, total, device=columns.device).expand(len(columns), -1)
    return torch.cat([columns, new], dim=1)


def narrow(mask: Tensor | None, queries: Tensor | None, cut: Cut) -> Tensor | None:
    """The host's mask over the surviving columns: [B, S], or [B, 1, Q, S] bool or additive.

    `queries` are the surviving query columns [B, Q'] in a pass over the whole prompt, None when decoding.
    """
    columns = with_new(cut.columns, cut.length, mask.shape[-1]).to(mask.device)
    valid = _valid(cut, columns.shape[1]).to(mask.device)
    if mask.ndim == 2:
        return mask.gather(1, columns) * valid
    mask = mask.expand(len(columns), *mask.shape[1:])
    if queries is not None:
        mask = attention.take(mask.transpose(1, 2), queries).transpose(1, 2)
    mask = attention.take(mask.permute(0, 3, 1, 2), columns).permute(0, 2, 3, 1)  # [B, 1, Q', K]
    mask = mask.contiguous()  # fused kernels want rows of it
    return mask if cut.whole else _hide(mask, ~valid)


def made_mask(cut: Cut, queries: int, keys: int, flash: bool, window: int | None = None) -> Tensor:
    """A mask where the host's has none or another length: [B, 1, Q, K] bool, for flash attention [B, K].

    The last Q of the K columns that are left are queries; a window counts columns of the whole prompt.
    """
    valid, columns = _valid(cut, keys), with_new(cut.columns, cut.length, cut.length + keys - cut.columns.shape[1])
    far = columns[:, None] <= columns[:, -queries:, None] - (columns.max() + 1 if window is None else window)
    if flash:
        return valid & ~far[:, -1]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=valid.device).tril(keys - queries)
    return _hide((causal & ~far)[:, None], ~valid)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of zeros and the lowest number instead of True and False."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _valid(cut: Cut, keys: int) -> Tensor:
    """Which of the `keys` columns may be attended to, [B, keys]; everything behind the prompt may."""
    return torch.cat([cut.valid, cut.valid.new_ones(len(cut.valid), keys - cut.valid.shape[1])], dim=1)


def _hide(mask: Tensor, hidden: Tensor) -> Tensor:
    """Let nobody but itself attend to the hidden columns [B, K]; mask [B, 1, Q, K], the last Q columns are queries."""
    queries, keys = mask.shape[-2:]
    own = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(keys - queries).tril(keys - queries)
    blocked = hidden[:, None, None] & ~own
    return mask & ~blocked if mask.dtype is torch.bool else mask.masked_fill(blocked, torch.finfo(mask.dtype).min)
