"""What the attention of one decoder layer worked on: enough to recompute single rows of it, one kernel untouched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.surgery import attention


@dataclass(frozen=True)
class Reading:
    """One layer in a pass over the whole prompt."""

    module: nn.Module  # the layer's attention
    hidden: Tensor  # [B, L, D] what it was called with, normed
    cos: Tensor  # [B or 1, L, d] rotary tables
    sin: Tensor
    keys: Tensor  # [B, Hkv, L, d] rotated
    valid: Tensor  # [B, L] bool: columns that are not padding
    columns: Tensor  # [B, L] where they are in the whole prompt: what a sliding window counts
    stored: Tensor | None = None  # [B, Hkv, L, d] values, where the cache holds them
    turns: bool = True  # whether queries and keys are rotated
    mask: Tensor | None = None  # [B or 1, 1, L, L] bool or additive, as the layer was given it; None: causal

    @classmethod
    def of(
        cls,
        module: nn.Module,
        hidden: Tensor,
        tables: tuple[Tensor, ...],
        stored: Any,
        valid: Tensor,
        columns: Tensor,
        mask: Tensor | None,
        turns: bool,
    ) -> Reading:
        """From the layer's normed input, its rotary tables, the cache that may hold its keys, and its mask."""
        cos, sin = (table[:, : hidden.shape[1]] for table in tables)
        keys, values = _cached(module, stored, hidden.shape[1])
        if keys is None:
            keys = attention.heads(module, "k_proj", hidden)
            keys = attention.rotated(module, keys, cos, sin) if turns else keys
        whole = mask is not None and mask.ndim == 4
        return cls(module, hidden, cos, sin, keys, valid, columns, values, turns, mask if whole else None)

    def last_row(self) -> Tensor:
        """Attention of the last real column, mean over heads, [B, L] fp32."""
        return self._last_row

    @cached_property
    def _last_row(self) -> Tensor:
        length = self.hidden.shape[1]
        last = (self.valid * torch.arange(1, length + 1, device=self.valid.device)).argmax(1, keepdim=True)  # [B, 1]
        query = self._queries(slice(None), last)  # [B, H, 1, d]
        if self.mask is None:
            visible = self.valid & self._near(self.columns.gather(1, last), self.columns)
        else:
            rows = self.mask[:, 0].expand(len(self.hidden), -1, -1)
            visible = self.valid & self._shown(rows.gather(1, last[..., None].expand(-1, -1, rows.shape[2]))[:, 0])
        return attention.row(query[:, :, 0], self.keys, attention.scale(self.module), visible, limit=self._limit)

    def rows(self, sample: int, columns: Tensor) -> Tensor:
        """Attention of some columns [T] of one sample, mean over heads, [T, L] fp32."""
        return torch.cat([self.head_rows(sample, few).mean(0) for few in self._pieces(columns)])

    def head_rows(self, sample: int, columns: Tensor) -> Tensor:
        """Attention of some columns [T] of one sample, [H, T, L] fp32."""
        queries = self._queries(slice(sample, sample + 1), columns[None])[0]
        factor, visible = attention.scale(self.module), self._visible(sample, columns)
        return attention.rows(queries, self.keys[sample], factor, visible, self._limit)

    def rotary_bias(self, sample: int, columns: Tensor) -> Tensor:
        """Logits of all-ones queries at some columns [T] and all-ones keys everywhere, [T, L] fp32."""
        cos, sin = (table.expand(len(self.hidden), -1, -1)[sample, None].float() for table in (self.cos, self.sin))
        ones = torch.ones_like(cos)[:, None, :, :1].expand(1, 1, -1, self.module.head_dim)
        turned = self._turned(ones, cos, sin)[0, 0]  # [L, d]
        return turned[columns] @ turned.T * attention.scale(self.module)

    def strongest(self, sample: int, columns: Tensor) -> Tensor:
        """Attention of some columns [T] of one sample, max over heads, sum over the columns, [L] fp32."""
        return sum(self.head_rows(sample, few).amax(0).sum(0) for few in self._pieces(columns))

    def _pieces(self, columns: Tensor) -> tuple[Tensor, ...]:
        """So many of the columns [T] at a time that the maps of all heads are no larger than their queries."""
        return columns.split(self.module.head_dim)

    def norms(self, sample: int) -> Tensor:
        """L1 norm of every column's key, heads side by side, [L] fp32."""
        return self.keys[sample].float().abs().sum((0, 2))

    def values(self, sample: int, columns: Tensor) -> Tensor:
        """Values of some columns [N] of one sample, of every query head, [H, N, d] fp32."""
        values = self._values(sample)[:, columns].float()
        groups = self.module.num_key_value_groups
        return values if groups == 1 else values.repeat_interleave(groups, dim=0)

    def outputs(self, sample: int, columns: Tensor) -> Tensor:
        """What attention makes of the values for some columns [T] of one sample, [H, T, d] fp32."""
        rows, values = self.head_rows(sample, columns), self._values(sample).float()
        return (rows.view(len(values), -1, rows.shape[-1]) @ values).view(*rows.shape[:2], -1)  # a group at a time

    def _values(self, sample: int) -> Tensor:
        """Values of one sample, [Hkv, L, d]."""
        if self.stored is not None:
            return self.stored[sample]
        return attention.heads(self.module, "v_proj", self.hidden[sample, None])[0]

    @property
    def _limit(self) -> float | None:
        """What the layer's logits stay below."""
        return attention.cap(self.module)

    def _visible(self, sample: int, columns: Tensor) -> Tensor:
        """What some columns [T] of one sample attend to, [T, L] bool."""
        if self.mask is not None:  # both ways inside an image, or over the whole prompt, in some families
            own = self.mask.expand(len(self.hidden), -1, -1, -1)[sample, 0]
            return self.valid[sample] & self._shown(own[columns])
        before = torch.arange(self.hidden.shape[1], device=columns.device) <= columns[:, None]
        places = self.columns[sample]
        return self.valid[sample] & before & self._near(places[columns, None], places)

    def _shown(self, rows: Tensor) -> Tensor:
        """Some rows of the mask [T, K] as bool, [T, L]."""
        rows = rows[:, : self.hidden.shape[1]]
        return rows if rows.dtype is torch.bool else rows > torch.finfo(rows.dtype).min / 2

    def _near(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether the keys at these places of the prompt are within the layer's window."""
        window = attention.window(self.module)
        return keys > queries - (self.columns.max() + 1 if window is None else window)

    def _queries(self, samples: slice, columns: Tensor) -> Tensor:
        """Rotated queries of columns [B, T] -> [B, H, T, d]."""
        cos, sin = (table.expand(len(self.hidden), -1, -1)[samples] for table in (self.cos, self.sin))
        query = attention.heads(self.module, "q_proj", attention.take(self.hidden[samples], columns))
        return self._turned(query, attention.take(cos, columns), attention.take(sin, columns))

    def _turned(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads [B, H, T, d] as the layer rotates them."""
        return attention.rotated(self.module, heads, cos, sin) if self.turns else heads


def _cached(module: nn.Module, cache: Any, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Rotated keys and values that the layer has just stored, [B, Hkv, L, d]; a window keeps only the last ones."""
    layer = None if cache is None else cache.layers[module.layer_idx]
    whole = layer is not None and layer.keys.shape[2] >= length
    return (layer.keys, layer.values) if whole else (None, None)
