"""Pooling: the control that averages neighbours instead of choosing among them.

For K = r x c on a full grid, plain average pooling to r rows and c columns: 24 x 24 -> 12 x 12 = 144, 8 x 8 = 64. The
same rule meets every K exactly, also where an earlier stage has left holes: the tokens are cut, in raster order, into
round(sqrt(K rows / columns)) strips, each strip by columns into its share of the K cells, all as equal as they can be,
and every cell becomes the mean of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from vtp_plugin.selectors import mean_by_owner, strip_counts
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens


@dataclass(kw_only=True)
class Pooling(PruningStrategy):
    """Keep averages over rectangles of the grid."""

    name = "pooling"
    stage = Stage.PROJECTOR
    paper = "control"
    merges = True
    default_keep_ratio = 0.25

    def select(self, visual: VisualTokens) -> Selection:
        k = self.wanted(visual)
        owners, middles = cells(visual.index, visual.grid, k)
        rows = [mean_by_owner(x.float(), owner, k) for x, owner in zip(visual.tokens, owners, strict=True)]
        keep = torch.zeros_like(visual.index, dtype=torch.bool).scatter_(1, middles, True)
        into = middles.gather(1, owners).unbind()
        return Selection(keep, tokens=tuple(rows), source=middles.unbind(), into=into)


def cells(index: Tensor, grid: tuple[int, int], k: int) -> tuple[Tensor, Tensor]:
    """The cell of every token [B, N] of raster positions `index`, and the token in the middle of every cell [B, k]."""
    n, plan = index.shape[1], torch.tensor(_plan(strip_counts(grid, k), index.shape[1]))
    strips, owners, middles = plan.to(index.device).split([n, n, k])
    raster = index.argsort(dim=1, stable=True)
    columns = index.gather(1, raster) % grid[1]
    order = raster.gather(1, (strips * grid[1] + columns).argsort(dim=1, stable=True))  # by strip, column and row
    owner = torch.empty_like(index).scatter_(1, order, owners.expand_as(order))
    return owner, order.gather(1, middles.expand(len(order), k))


def _plan(counts: Sequence[int], n: int) -> list[int]:
    """Where n tokens go, for `counts` cells in every strip.

    The strip of every token in raster order; then, in the order of strips and columns, the cell of every token and the
    middle of every cell.
    """
    ends = [0, *accumulate(counts)]  # cells before each strip
    bounds = [end * n // ends[-1] for end in ends]  # tokens before each strip
    strips = [strip for strip, (a, b) in enumerate(pairwise(bounds)) for _ in range(b - a)]
    edges = []  # tokens before each cell
    for (a, b), number in zip(pairwise(bounds), counts, strict=True):
        edges += [a + cell * (b - a) // number for cell in range(number)]
    spans = list(pairwise([*edges, n]))
    owners = [cell for cell, (a, b) in enumerate(spans) for _ in range(b - a)]
    return [*strips, *owners, *(a + (b - a) // 2 for a, b in spans)]
