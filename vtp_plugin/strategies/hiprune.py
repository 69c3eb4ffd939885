"""HiPrune: a few anchors that shallow layers look at, with their neighbours; the rest by what deep layers look at.

Source: arXiv 2508.00553 and the authors' code. The attention that a patch receives, mean over heads and all queries
(the class token's too), so that no class token is needed:
1. anchors: the round(alpha K / 5) patches with the most in block `shallow` (8, 0-based: the ninth), alpha -> `alpha`
   (0.1), and of each the four neighbours: index +-1 and +- the columns of the grid, clamped to the picture. The row
   does not matter: the neighbour on the right of the last column is the first one of the next row;
2. the rest, up to K, are the patches with the most in the projected block.
Ascending order, positions renumbered. K = int(r N); where anchors and neighbours are more than K, anchors go first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtp_plugin.selectors import mask
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens, best


@dataclass(kw_only=True)
class HiPrune(PruningStrategy):
    """Keep patches that shallow layers attend to, their neighbours, and patches that deep layers attend to."""

    name = "hiprune"
    stage = Stage.PROJECTOR
    paper = "HiPrune: Hierarchical Attention for Token Pruning, https://arxiv.org/abs/2508.00553"
    needs = ("received", "shallow_received")
    default_keep_ratio = 64 / 576

    alpha: float = 0.1  # share of the budget for anchors and their neighbours
    shallow: int = 8  # the block that anchors are read from

    def validate(self) -> None:
        self.check_number("alpha", 0, 1)
        self.check("shallow", isinstance(self.shallow, int), "must be a whole number")

    @property
    def shallow_layer(self) -> int:
        return self.shallow

    def select(self, visual: VisualTokens) -> Selection:
        scores = self._scores(visual)
        return Selection.of(best(scores, self.wanted(visual)), scores.shape[1], scores=scores)

    def _scores(self, visual: VisualTokens) -> Tensor:
        """What a patch receives in the projected block; 2 more for an anchor, 1 more for a neighbour."""
        score, columns = visual.received.float(), visual.grid[1]
        wanted, n = round(self.alpha * self.wanted(visual) / 5), visual.tokens.shape[1]
        anchors = best(visual.shallow_received, wanted)  # [B, A]
        near = torch.cat([anchors - columns, anchors - 1, anchors + 1, anchors + columns], dim=1).clamp(0, n - 1)
        anchor, beside = mask(anchors, n), mask(near, n)
        return score + torch.where(anchor, 2.0, (beside & ~anchor).float())
