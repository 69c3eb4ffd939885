"""DivPrune: the subset of projected tokens whose smallest mutual distance is as large as a greedy search finds it.

Source: arXiv 2503.02175 (CVPR 2025): d_ij = 1 - cos(z_i, z_j) of the projected tokens (`projected`); the first pick is
the token with the farthest nearest neighbour, then repeatedly j* = argmax_j min_{i in S} d_ij, until K = round(r N);
ascending order, positions renumbered. r -> `keep_ratio`, 0.098 in the paper (56 of 576).

`weight` multiplies every candidate's distance, the first one's too, and covers what later papers add:
* norm: |z_j|. On towers with a merger the sensitivity that ZOO-Prune estimates (arXiv 2509.24837) ranks like the norm
  of the projected row (0.986), so this stands for it;
* attention: the CLS attention of the projected block, as SCoRe's score;
* distinctiveness: Cen-Prune (arXiv 2608.30263): distances are of *centred* tokens, the weight is the min-max of
  g_j = - mean_i cos(z_i, z_j) of the raw ones. Centring alone is worse than none at tight budgets.

Our reading: distances in fp32, and what is picked cannot be picked again: the released code returns fewer distinct
tokens where tokens repeat each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtp_plugin.selectors import centred, cosines, farthest_points, minmax
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import ComparingStrategy
from vtp_plugin.tokens import Selection, VisualTokens


@dataclass(kw_only=True)
class DivPrune(ComparingStrategy):
    """Keep tokens that are far from each other."""

    name = "divprune"
    stage = Stage.PROJECTOR
    paper = "DivPrune: Diversity-based Visual Token Pruning, https://arxiv.org/abs/2503.02175"
    default_keep_ratio = 0.098

    weight: str = "none"  # of the distances: none, norm, attention or distinctiveness

    def validate(self) -> None:
        self.check_choice("weight", ("none", "norm", "attention", "distinctiveness"))

    @property
    def needs(self) -> tuple[str, ...]:
        return self.reads("projected") + ("cls_attention",) * (self.weight == "attention")

    def rounded(self, exact: float) -> int:
        return round(exact)

    def select(self, visual: VisualTokens) -> Selection:
        z = self.judged(visual, visual.projected)
        weights = self._weights(visual, z)
        apart = cosines(centred(z) if self.weight == "distinctiveness" else z).neg_().add_(1)
        return Selection.of(farthest_points(apart, self.wanted(visual), weights), visual.tokens.shape[1])

    def _weights(self, visual: VisualTokens, z: Tensor) -> Tensor | None:
        """[B, N], of tokens [B, N, D]."""
        if self.weight == "norm":
            return z.float().norm(dim=-1)
        if self.weight == "attention":
            return visual.cls_attention.float()
        return minmax(-cosines(z).mean(-1)) if self.weight == "distinctiveness" else None
