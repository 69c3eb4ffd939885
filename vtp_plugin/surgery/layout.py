"""How the tokens of a tower lie, which parts cut there, and how the attention of a block is read: named by a family.

A layout is put together from parts: one that cuts before and inside the tower (`early`), one that cuts in front of the
prompt (`late`), and functions about the family's own way. transformers and vLLM use the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vtp_plugin.facts.tower import Tower
from vtp_plugin.signals import BlockView
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.passes import TowerPass
from vtp_plugin.surgery.undo import Undo


@dataclass(frozen=True)
class Block:
    """One block of a tower that begins."""

    number: int
    attention: nn.Module
    prefix: int  # tokens in front of the patches
    passing: TowerPass


ReadBlock = Callable[[Block, tuple[Any, ...], Mapping[str, Any]], BlockView]


class Part(Protocol):
    """A part of the cuts around one tower; made with the `VisionCuts` that it belongs to."""

    shared_budgets: Collection[Stage]  # where several images of a prompt can share one budget
    arranged: bool  # the host arranges the tower's tokens by their places, so they cannot be merged inside

    def check(self, strategy: PruningStrategy) -> None:
        """PruningError if a strategy of one of its stages asks for what it cannot do."""

    def install(self, undo: Undo) -> None:
        """Hook the model."""


def separate_projections(block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockView:
    """A block whose attention has q_proj and k_proj, called with normed hidden states [B, prefix + N, D]."""
    module, hidden = block.attention, args[0] if args else kwargs["hidden_states"]
    keys = attention.heads(module, "k_proj", hidden)  # [B, H, prefix + N, d]
    queries = partial(attention.heads, module, "q_proj", hidden)
    values = partial(attention.heads, module, "v_proj", hidden[:, block.prefix :])
    if not block.prefix:
        return BlockView(
            keys,
            None,
            lambda: attention.received(queries(), keys, attention.scale(module)),
            project_values=values,
        )
    query = attention.heads(module, "q_proj", hidden[:, :1])[:, :, 0]  # [B, H, d]
    return class_token_view(block, query, keys, queries, values)


def class_token_view(
    block: Block, query: Tensor, keys: Tensor, queries: Callable[[], Tensor], values: Callable[[], Tensor]
) -> BlockView:
    """What the class token sees: its query [B, H, d], keys and queries of all tokens [B, H, prefix + N, d]."""
    factor, prefix, bias = attention.scale(block.attention), block.prefix, block.passing.key_weights
    return BlockView(
        keys[:, :, prefix:],
        query,
        lambda: attention.row(query, keys, factor, bias=bias)[:, prefix:],
        keys[:, :, 0],
        lambda: attention.received(queries(), keys, factor, bias=bias)[:, prefix:],
        values,
    )


def sequences_view(
    query: Tensor,
    key: Tensor,
    keys: Tensor,
    lengths: Sequence[int],
    factor: float,
    *,
    equal: bool = True,
    values: Callable[[], Tensor] | None = None,
) -> BlockView:
    """Sequences that attend to themselves, side by side: rotated queries and keys, and keys before, [H, S, d] each.

    Attention is what a patch receives; `equal`: one on average in every sequence, however long it is.
    """

    def attend() -> Tensor:
        spans = zip(query.split(lengths, 1), key.split(lengths, 1), strict=True)
        rows = [attention.received(q[None], k[None], factor)[0] for q, k in spans]
        return torch.cat([row * len(row) if equal else row for row in rows])

    return BlockView(keys, None, attend, project_values=values)


def of_tiles(tower: Tower, passing: TowerPass) -> tuple[int, ...]:
    """Maps [T, N] of tiles."""
    return len(passing.tiles), tower.grid[0] * tower.grid[1]


def tile_in_image(tower: Tower, passing: TowerPass) -> Tensor:
    """Number of the tile within its image, as a map [T, N]."""
    owners = torch.tensor(passing.tiles)
    first = torch.cat([owners.new_zeros(1), (owners[1:] != owners[:-1]).long()]).cumsum(0)
    starts = torch.searchsorted(first, first)
    return (torch.arange(len(owners)) - starts).float()[:, None].expand(of_tiles(tower, passing))


@dataclass(frozen=True)
class Layout:
    """What a family names."""

    early: Callable[[Any], Part]
    late: Callable[[Any], Part]
    read: ReadBlock = separate_projections
    shape: Callable[[Tower, TowerPass], tuple[int, ...]] = of_tiles  # of maps
    tile: Callable[[Tower, TowerPass], Tensor] = tile_in_image  # crop or frame of every patch within its image, a map
