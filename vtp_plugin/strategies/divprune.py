"""DivPrune: the subset of projected tokens whose smallest mutual distance is as large as a greedy search finds it.

Source: arXiv 2503.02175 (CVPR 2025): d_ij = 1 - cos(z_i, z_j) of the projected tokens (`projected`); the first pick is
the token with the farthest nearest neighbour, then repeatedly j* = argmax_j min_{i in S} d_ij, until K = round(r N);
ascending order, positions renumbered. r -> `keep_ratio`, 0.098 in the paper (56 of 576).

Our reading: distances in fp32, and what is picked cannot be picked again: the released code returns fewer distinct
tokens where tokens repeat each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtp_plugin.selectors import cosines, farthest_points
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens


@dataclass(kw_only=True)
class DivPrune(PruningStrategy):
    """Keep tokens that are far from each other."""

    name = "divprune"
    stage = Stage.PROJECTOR
    paper = "DivPrune: Diversity-based Visual Token Pruning, https://arxiv.org/abs/2503.02175"
    needs = ("projected",)
    default_keep_ratio = 0.098

    def rounded(self, exact: float) -> int:
        return round(exact)

    def select(self, visual: VisualTokens) -> Selection:
        picks = farthest_points(1 - cosines(visual.projected), self.wanted(visual))
        return Selection.of(picks, visual.tokens.shape[1])
