"""Pooling: the control that averages neighbours instead of choosing among them.

For K = r x c on a full grid, plain average pooling to r rows and c columns: 24 x 24 -> 12 x 12 = 144, 8 x 8 = 64. The
same rule meets every K exactly, also where an earlier stage has left holes: the tokens are cut, in raster order, into
round(sqrt(K rows / columns)) strips, each strip by columns into its share of the K cells, all as equal as they can be,
and every cell becomes the mean of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    n = index.shape[1]
    strips, owners, middles = _plan(n, k, len(strip_counts(grid, k)), index.device)
    raster = index.argsort(dim=1, stable=True)
    columns = index.gather(1, raster) % grid[1]
    order = raster.gather(1, (strips * grid[1] + columns).argsort(dim=1, stable=True))  # by strip, column and row
    owner = torch.empty_like(index).scatter_(1, order, owners.expand_as(order))
    return owner, order.gather(1, middles.expand(len(order), k))


def _plan(n: int, k: int, strips: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where n tokens go, for k cells in so many strips, as even as whole numbers allow.

    The strip of every token in raster order [n]; then, in the order of strips and columns, the cell of every token [n]
    and the middle of every cell [k].
    """
    token, cell = torch.arange(n, device=device), torch.arange(k, device=device)
    ends = torch.arange(strips + 1, device=device) * k // strips  # cells before each strip
    bounds = ends * n // k  # tokens before each strip
    strip = _last_at_most(ends, cell)
    first, number = ends[strip], ends[strip + 1] - ends[strip]
    edges = bounds[strip] + (cell - first) * (bounds[strip + 1] - bounds[strip]) // number  # tokens before each cell
    lengths = torch.cat([edges[1:], bounds[-1:]]) - edges
    return _last_at_most(bounds, token), _last_at_most(edges, token), edges + lengths // 2


def _last_at_most(bounds: Tensor, values: Tensor) -> Tensor:
    """The last of the ascending bounds that is not above each value."""
    return torch.searchsorted(bounds, values, right=True) - 1
