"""Pooling: the control that averages neighbours instead of choosing among them.

For K = r x c on a full grid, plain average pooling to r rows and c columns: 24 x 24 -> 12 x 12 = 144, 8 x 8 = 64. The
same rule meets every K exactly, also where an earlier stage has left holes: the tokens are cut, in raster order, into
round(sqrt(K rows / columns)) strips, each strip by columns into its share of the K cells, all as equal as they can be,
and every cell becomes the mean of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

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
        found = [cells(index, visual.grid, k) for index in visual.index]
        rows = [mean_by_owner(x.float(), owner, k) for x, (owner, _) in zip(visual.tokens, found, strict=True)]
        sources = [middle for _, middle in found]
        keep = torch.zeros_like(visual.index, dtype=torch.bool)
        into = tuple(middle[owner] for owner, middle in found)
        keep.scatter_(1, torch.stack(sources), True)
        return Selection(keep, tokens=tuple(rows), source=tuple(sources), into=into)


def cells(index: Tensor, grid: tuple[int, int], k: int) -> tuple[Tensor, Tensor]:
    """The cell of every token [N] of raster positions `index`, and the token in the middle of every cell [k]."""
    counts = strip_counts(grid, k)
    ends = [0, *accumulate(counts)]  # cells before each strip
    bounds = [end * len(index) // k for end in ends]  # tokens before each strip
    raster = index.argsort(stable=True)
    owner, middle = torch.empty_like(index), index.new_empty(k)
    for strip, number in enumerate(counts):
        members = raster[bounds[strip] : bounds[strip + 1]]
        members = members[(index[members] % grid[1]).argsort(stable=True)]  # by column, then by row
        edges = [cell * len(members) // number for cell in range(number + 1)]
        for cell in range(number):
            own = members[edges[cell] : edges[cell + 1]]
            owner[own], middle[ends[strip] + cell] = ends[strip] + cell, own[len(own) // 2]
    return owner, middle
