"""What a strategy sees (VisualTokens), what it answers (Selection), and the top-k that both share."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of B images at one stage. A signal that the strategy did not ask for (`needs`) is None.

    B images of one call that have the same number N of tokens are judged together; rows never influence each other.
    """

    tokens: Tensor  # [B, N, D] patch embeddings, tower features or hidden states, depending on the stage
    grid: tuple[int, int]  # rows and columns of the full patch grid
    index: Tensor  # [B, N] long: raster position of every token in that grid, -1 for a token that has none
    pixels: Tensor | None = None  # [B, N, 3, p, p] uint8: the raw patches
    centered: Tensor | None = None  # vit stage, [B, N, D]: embeddings of the patches minus their mean colour
    positioned: Tensor | None = None  # vit stage, [B, N, D]: embeddings with their position embeddings added
    cls: Tensor | None = None  # [B, D] the tower's CLS feature of the projected layer; inside a block: its CLS token
    sizes: Tensor | None = None  # inside a block, [B, N] fp32: patches that every token stands for
    cls_attention: Tensor | None = None  # [B, N] fp32: attention CLS -> patch, mean over heads, of block `tower_layer`
    heads: int | None = None  # of that block: how many attention rows the mean is taken over
    keys: Tensor | None = None  # [B, N, d] fp32: keys of block `tower_layer`, mean over heads, bias included
    aligned: Tensor | None = None  # [B, N, E] fp32: output of block `tower_layer` in CLIP's shared space
    text: Tensor | None = None  # [B, E] fp32: CLIP text embedding of the image's question; `segments`: of unit pieces
    projected: Tensor | None = None  # [B, N, L]: what the projector makes of the tokens
    class_query: Tensor | None = None  # [B, d'] fp32: query of CLS in block `tower_layer`, heads side by side, unscaled
    class_key: Tensor | None = None  # [B, d'] fp32: key of CLS in that block, heads side by side
    raw_keys: Tensor | None = None  # [B, N, d'] fp32: keys of block `tower_layer`, heads side by side
    last_query_attention: Tensor | None = None  # [B, N] fp32: attention of the last prompt token, mean over heads
    next_query_attention: Tensor | None = None  # [B, N] fp32: the same in the layer behind the cut, before cutting
    text_attention: Tensor | None = None  # [B, T, N] fp32: attention of every text token behind the image
    head_attention: Tensor | None = None  # [B, H, T, N] fp32: the same of every head
    rotary_bias: Tensor | None = None  # [B, T, N] fp32: logits of all-ones queries and keys at the places of both
    self_attention: Tensor | None = None  # [B, N] fp32: from the image's own tokens, max over heads, mean over them
    cross_attention: Tensor | None = None  # [B, N] fp32: from the text behind the image, max over heads, sum over it
    entry: Tensor | None = None  # [B, M, D]: embeddings of the `entered` tokens, text_entry [B, T, D]: of that text
    text_entry: Tensor | None = None
    key_norms: Tensor | None = None  # [B, N] fp32: L1 norms of the keys of the layer before the cut, all heads
    text_key_norms: Tensor | None = None  # [B, T]
    normed: Tensor | None = None  # [B, N, D]: tokens after the language model's final norm
    text_normed: Tensor | None = None  # [B, T, D]
    fingerprint: tuple[int, ...] | None = None  # one number per image, the same in any batch, order and precision
    layer: int | None = (
        None  # llm stage: the decoder layer that will not see the dropped tokens; vit: the merging block
    )
    view: Tensor | None = (
        None  # [B, N] long: 0 for the picture of the whole image, 1 ... for its sub-images, row by row
    )
    place: Tensor | None = None  # [B, N, 2] fp32: middle of the token in its view, down and across, in (0, 1)
    first_attention: Tensor | None = None  # [B, N] fp32: as `cls_attention`, of the tower's first block
    views: tuple[int, int] | None = None  # rows and columns of sub-images; None, as the three above: one view
    cut: tuple[int, int] = (0, 1)  # which cut of the strategy this is, and of how many
    entered: int | None = None  # tokens of the image at the strategy's first cut; None: this is the first

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.index.shape != self.tokens.shape[:2]:
            raise ValueError(f"tokens {tuple(self.tokens.shape)} and index {tuple(self.index.shape)} do not fit")


@dataclass(frozen=True)
class Selection:
    """Decided once, then applied to every tensor with a token axis. Rows may keep different numbers of tokens."""

    keep: Tensor  # [B, N] bool: True survives
    _: KW_ONLY
    tokens: tuple[Tensor, ...] | None = None  # per image [K, D]: new values, where the method merges or reorders
    source: tuple[Tensor, ...] | None = None  # per image [K] long: column of each new token, -1 for none (CLS)
    owner: Tensor | None = None  # inside a block, [B, N] long: the new token that every token becomes part of
    places: tuple[Tensor, ...] | None = None  # pixels stage, new patches: per image [K, 2], row and column in the grid
    scores: Tensor | None = None  # [B, N], higher is kept: what the method ranked by, for pictures only
    into: tuple[Tensor, ...] | None = None  # per image [N]: column that a token was merged into, -1: none; for pictures

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """Per image, the columns of the survivors in their new order."""
        return self.source if self.source is not None else tuple(row.nonzero().flatten() for row in self.keep)

    @property
    def counts(self) -> list[int]:
        return [len(columns) for columns in self.sources]

    @property
    def keeps_all(self) -> bool:
        return self.tokens is None and self.source is None and bool(self.keep.all())

    def apply(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The surviving rows of `tokens` [B, N, D], per image [K, D]; the method's own values where it merges."""
        if self.tokens is not None:
            return tuple(row.to(tokens.dtype) for row in self.tokens)
        return tuple(row[columns] for row, columns in zip(tokens, self.sources, strict=True))

    def merged(self, values: Tensor, sizes: Tensor) -> Tensor:
        """Means of `values` [B, N, ...] over the owners, weighted by `sizes` [B, N]: [B, K, ...] fp32."""
        flat, source = values.float().flatten(2) if values.ndim > 2 else values.float()[..., None], self.sources
        k, rows = len(source[0]), []
        for x, size, column, owner in zip(flat, sizes.float(), source, self.owner, strict=True):
            moved = torch.ones_like(owner, dtype=torch.bool).index_fill_(0, column, False).nonzero().flatten()
            join = one_hot(owner[moved], k).T.to(x)  # [K, M]; a product, because index_add_ is random on CUDA
            total = size[column] + join @ size[moved]
            weighted = x[column] * size[column, None] + join @ (x[moved] * size[moved, None])
            rows.append(weighted / total[:, None])
        return torch.stack(rows).view(len(flat), k, *values.shape[2:])


def top_k(scores: Tensor, k: int) -> Tensor:
    """A mask [B, N] of the k highest scores of every row; ties go to the lower index."""
    order = scores.float().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
