"""VisPruner: important patches by CLS attention, diverse ones by thinning out what resembles each other.

Source: arXiv 2412.01818 v2 (ICCV 2025). K_imp = int(K rho) -> `important`, K_div = K - K_imp.
1. patches by falling CLS attention of the projected block; the first K_imp stay, the rest R keeps that order;
2. while |R| > K_div: R is split into its even positions a and its odd positions b; s = max cosine of each a to the b's
   (features before the projector); the min(8, |R| - K_div) members of a with the largest s leave; the new R is what is
   left of a, by falling s, followed by b;
3. both groups in raster order; positions are renumbered.

Our reading: a list of odd length gives a one member more (the released code raises), so exactly K tokens are left for
every K; a round never removes more than a holds; cosines in fp32, equal ones by their place in the list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtp_plugin.selectors import cosines
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import ComparingStrategy
from vtp_plugin.tokens import Selection, VisualTokens

LEAVE = 8  # patches per round


@dataclass(kw_only=True)
class VisPruner(ComparingStrategy):
    """Keep the most attended patches and, of the others, those that no other patch resembles."""

    name = "vispruner"
    stage = Stage.PROJECTOR
    paper = "Beyond Text-Visual Attention: VisPruner, https://arxiv.org/abs/2412.01818"
    default_keep_ratio = 0.25

    important: float = 0.5  # rho: share of the budget that CLS attention spends

    def validate(self) -> None:
        self.check_number("important", 0, 1)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("cls_attention", *self.reads())

    def select(self, visual: VisualTokens) -> Selection:
        k = self.wanted(visual)
        order = visual.cls_attention.float().sort(dim=-1, descending=True, stable=True).indices  # [B, N]
        first = int(k * self.important + 1e-9)
        rest = thinned(cosines(self.judged(visual, visual.tokens)), order[:, first:], k - first)
        picks = torch.cat([order[:, :first], rest], dim=1)
        return Selection.of(picks, order.shape[1], scores=visual.cls_attention)


def thinned(similarity: Tensor, rest: Tensor, k: int) -> Tensor:
    """Thin out the columns `rest` [B, R] to k of them; similarity [B, N, N]."""
    while rest.shape[1] > k:
        a, b = rest[:, ::2], rest[:, 1::2]
        leaving = min(LEAVE, rest.shape[1] - k, a.shape[1])
        closest = _closest(similarity, a, b)
        rank = closest.sort(dim=-1, descending=True, stable=True).indices
        rest = torch.cat([a.gather(1, rank[:, leaving:]), b], dim=1)
    return rest


def _closest(similarity: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The largest similarity of each a [B, n] to any b [B, m], [B, n]; nothing resembles a where b is empty."""
    if b.shape[1] == 0:
        return torch.zeros_like(a, dtype=torch.float32)
    rows = torch.arange(len(a), device=a.device)[:, None, None]
    return similarity[rows, a[:, :, None], b[:, None]].amax(-1)
