"""What a strategy sees (VisualTokens), what it answers (Selection), and the top-k that both share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vtp_plugin.signals import names as declared


@dataclass(frozen=True, init=False)
class VisualTokens:
    """The visual tokens of B images at one stage, and the signals that the strategy asked for (`needs`).

    A signal is an attribute, `visual.cls_attention`; one that was not asked for is None. docs/add-a-strategy.md lists
    them, `vtp_plugin.signals` declares them. B images of one call that have the same number N of tokens are judged
    together; rows never influence each other.
    """

    tokens: Tensor  # [B, N, D] patch embeddings, tower features or hidden states, depending on the stage
    grid: tuple[int, int]  # rows and columns of the full patch grid
    index: Tensor  # [B, N] long: raster position of every token in that grid, -1 for a token that has none
    layer: int | None  # llm: the decoder layer that will not see the dropped tokens; vit: the merging block
    views: tuple[int, int] | None  # rows and columns of sub-images; None, as their signals: one view
    cut: tuple[int, int]  # which cut of the strategy this is, and of how many
    entered: int | None  # tokens of the image at the strategy's first cut; None: this is the first
    signals: Mapping[str, Any] = property(lambda self: {n: v for n, v in vars(self).items() if n in declared()})

    def __init__(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        index: Tensor,
        *,
        layer: int | None = None,
        views: tuple[int, int] | None = None,
        cut: tuple[int, int] = (0, 1),
        entered: int | None = None,
        signals: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> None:
        """`named`: signals, which take the place of those in `signals`."""
        if tokens.ndim != 3 or index.shape != tokens.shape[:2]:
            raise ValueError(f"tokens {tuple(tokens.shape)} and index {tuple(index.shape)} do not fit")
        unknown = [name for name in named if name not in declared()]
        if unknown:
            raise TypeError(f"VisualTokens has no signal '{unknown[0]}'. Signals: {', '.join(sorted(declared()))}")
        facts = {"tokens": tokens, "grid": grid, "index": index, "layer": layer, "views": views, "cut": cut}
        vars(self).update(facts | {"entered": entered} | dict(signals or {}) | named)

    def __getattr__(self, name: str) -> Any:
        """A signal that was not asked for is None."""
        if name.startswith("_"):
            raise AttributeError(name)
        if name in declared():
            return None
        raise AttributeError(f"no signal is named '{name}'. Signals: {', '.join(sorted(declared()))}")


@dataclass(frozen=True)
class Selection:
    """Decided once, then applied to every tensor with a token axis. Rows may keep different numbers of tokens.

    Where the method knows how many it keeps, `Selection.of` never asks the device what is in the mask.
    """

    keep: Tensor  # [B, N] bool: True survives
    _: KW_ONLY
    columns: Tensor | None = None  # [B, K] long, ascending: where `keep` is True; None: not known, the mask is asked
    tokens: tuple[Tensor, ...] | None = None  # per image [K, D]: new values, where the method merges or reorders
    source: tuple[Tensor, ...] | None = None  # per image [K] long: column of each new token, -1 for none (CLS)
    owner: Tensor | None = None  # inside a block, [B, N] long: the new token that every token becomes part of
    places: tuple[Tensor, ...] | None = None  # pixels stage, new patches: per image [K, 2], row and column in the grid
    scores: Tensor | None = None  # [B, N], higher is kept: what the method ranked by, for pictures only
    finite: Tensor | None = None  # bool: whether all scores are numbers; on a GPU asked at the end of the call
    into: tuple[Tensor, ...] | None = None  # per image [N]: column that a token was merged into, -1: none; for pictures

    @classmethod
    def of(cls, picks: Tensor, n: int, **more: Any) -> Selection:
        """Keep the picks [B, K], in any order but no one twice, of n tokens."""
        columns = picks.sort(dim=1).values
        return cls(
            torch.zeros(len(columns), n, dtype=torch.bool, device=columns.device).scatter_(1, columns, True),
            columns=columns,
            **more,
        )

    @classmethod
    def everything(cls, index: Tensor) -> Selection:
        """Keep all tokens of images with raster positions `index` [B, N]."""
        columns = torch.arange(index.shape[1], device=index.device).expand(index.shape)
        return cls(torch.ones_like(index, dtype=torch.bool), columns=columns)

    @cached_property
    def sources(self) -> tuple[Tensor, ...]:
        """Per image, the columns of the survivors in their new order."""
        if self.source is not None:
            return self.source
        if self.columns is not None:
            return self.columns.unbind()
        counts = self.keep.sum(1).tolist()
        first = true_columns(self.keep, max(counts, default=0))
        return tuple(row[:count] for row, count in zip(first, counts, strict=True))

    @property
    def counts(self) -> list[int]:
        return [len(columns) for columns in self.sources]

    @property
    def keeps_all(self) -> bool:
        return self.tokens is None and self.source is None and min(self.counts, default=0) == self.keep.shape[1]

    def apply(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The surviving rows of `tokens` [B, N, D], per image [K, D]; the method's own values where it merges."""
        if self.tokens is not None:
            return tuple(row.to(tokens.dtype) for row in self.tokens)
        if self.source is None and self.columns is not None:
            return at(tokens, self.columns).unbind()
        return tuple(row[columns] for row, columns in zip(tokens, self.sources, strict=True))

    def taken(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """Numbers of the tokens [B, N] at the survivors, per image [K]; every survivor is one of the tokens."""
        if self.source is None and self.columns is not None:
            return numbers.gather(1, self.columns).unbind()
        return tuple(row[columns] for row, columns in zip(numbers, self.sources, strict=True))

    def merged(self, values: Tensor, sizes: Tensor) -> Tensor:
        """Means of `values` [B, N, ...] over the owners, weighted by `sizes` [B, N]: [B, K, ...] fp32."""
        flat, source = values.float().flatten(2) if values.ndim > 2 else values.float()[..., None], self.sources
        k, rows = len(source[0]), []
        for x, size, column, owner in zip(flat, sizes.float(), source, self.owner, strict=True):
            moved = true_columns(torch.ones_like(owner, dtype=torch.bool).index_fill_(0, column, False), len(owner) - k)
            join = one_hot(owner[moved], k).T.to(x)  # [K, M]; a product, because index_add_ is random on CUDA
            total = size[column] + join @ size[moved]
            weighted = x[column] * size[column, None] + join @ (x[moved] * size[moved, None])
            rows.append(weighted / total[:, None])
        return torch.stack(rows).view(len(flat), k, *values.shape[2:])


def top_k(scores: Tensor, k: int) -> Tensor:
    """A mask [B, N] of the k highest scores of every row; ties go to the lower index."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best(scores, k), True)


def best(scores: Tensor, k: int) -> Tensor:
    """Columns of the k highest scores of every row [..., N], the highest first, ties by the lower index: [..., k]."""
    return scores.float().sort(dim=-1, descending=True, stable=True).indices[..., :k]


def last_true(mask: Tensor) -> Tensor:
    """The last column [B] that is True in each row of a mask [B, N]; 0 in a row without one."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)


def true_columns(mask: Tensor, k: int) -> Tensor:
    """Where a mask [..., N] with k True in every row is True, ascending: [..., k]; nobody waits for the device."""
    return mask.byte().sort(dim=-1, descending=True, stable=True).indices[..., :k]


def at(values: Tensor, columns: Tensor) -> Tensor:
    """The rows of values [B, N, D] at columns [B, K]: [B, K, D]."""
    return values.gather(1, columns[..., None].expand(-1, -1, values.shape[-1]))


def without(columns: Tensor, chosen: Tensor, n: int) -> Tensor:
    """Columns [..., P] of n, ascending as they come, without the chosen ones [..., M] among them: [..., P - M]."""
    mark = torch.zeros(*columns.shape[:-1], n, dtype=torch.bool, device=columns.device).scatter_(-1, chosen, True)
    return columns.gather(-1, true_columns(~mark.gather(-1, columns), columns.shape[-1] - chosen.shape[-1]))
