"""HiRED: a token budget, spent by CLS attention, divided among the views of a high-resolution picture.

Source: arXiv 2408.10945 (AAAI 2025) and the authors' code. One view (LLaVA-1.5): the top int(rate N) patches by the CLS
attention of the projected block (sum over heads, which ranks as the mean does): rate -> `keep_ratio`, 0.2 by default,
115 of 576. Several views (a picture of the whole and sub-images), with a budget of B tokens:
1. the picture of the whole gets min(int(alpha B), all of it);
2. on it, the int((1 - alpha) N) tokens with the highest CLS attention in the FIRST block are marked and counted by the
   region that each sub-image shows; sub-image j gets int(share_j of the rest), as far as it has as many tokens;
3. every view spends its part on its tokens with the highest attention of the projected block.

Switches: `shares`: marks, as the code counts, or attention, the paper's sum of scores over a region.
`regions`: spatial, what a sub-image shows, or strips, which is what the code counts in: it cuts the raster of the
picture of the whole into equal pieces, one per sub-image, which are horizontal strips.

Ours: B is the budget over the tokens that enter the prompt (without padding and newlines), and is spent exactly: what
rounding and small sub-images leave over goes to the highest attention among the rest. The code loses it, and what it
spends on padding. The padding around a picture does not move the regions, as in the code. budget=per_tile and
budget=total rank all tokens that they count over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import VisualTokens


@dataclass(kw_only=True)
class HiRED(PruningStrategy):
    """Keep the patches with the highest CLS attention, in every view as many as its region deserves."""

    name = "hired"
    stage = Stage.PROJECTOR
    paper = "HiRED: High-Resolution Early Dropping, https://arxiv.org/abs/2408.10945"
    needs = ("cls_attention", "first_attention", "view", "place")
    default_keep_ratio = 0.2

    alpha: float = 0.5  # share of the budget for the picture of the whole
    shares: str = "marks"  # of sub-images: marks as in the code, attention as in the paper
    regions: str = "spatial"  # of sub-images in the picture of the whole: spatial, or strips as in the code

    def validate(self) -> None:
        self.check_number("alpha", 0, 1)
        self.check_choice("shares", ("marks", "attention"))
        self.check_choice("regions", ("spatial", "strips"))

    def score(self, visual: VisualTokens) -> Tensor:
        """CLS attention, one more for the tokens that a view spends its part of the budget on."""
        attention = visual.cls_attention
        if visual.views is None:
            return attention
        parts = torch.stack([self._parts(visual, b, self.wanted(visual)) for b in range(len(attention))])
        spent = _ranks(attention, visual.view, parts.shape[1]) < parts.gather(1, visual.view)
        return attention + spent.to(attention)

    def _parts(self, visual: VisualTokens, b: int, budget: int) -> Tensor:
        """What every view of image b gets of the budget, the picture of the whole first, [views] long."""
        whole, regions = visual.view[b] == 0, visual.views[0] * visual.views[1]
        first = whole.sum().clamp(max=int(self.alpha * budget))
        weights = self._weights(visual.first_attention[b].double(), whole)
        members = one_hot(self._regions(visual.place[b], whole, *visual.views).clamp(0, regions - 1), regions)
        shares = (members * weights[:, None]).sum(0)
        parts = (shares / weights.sum().clamp(min=1e-12) * (budget - first) + 1e-9).long()
        return torch.cat([first[None], parts])

    def _weights(self, attention: Tensor, whole: Tensor) -> Tensor:
        """What a token [N] counts for its region: nothing outside of the picture of the whole."""
        if self.shares == "attention":
            return attention * whole
        marked = ((1 - self.alpha) * whole.sum().double() + 1e-9).long()
        return ((_ranks(attention[None], (~whole).long()[None], 2)[0] < marked) & whole).double()

    def _regions(self, place: Tensor, whole: Tensor, rows: int, columns: int) -> Tensor:
        """The sub-image that shows each of the places [N, 2] of the picture of the whole, counted row by row."""
        if self.regions == "strips":
            return (whole.long().cumsum(0) - 1) * (rows * columns) // whole.sum().clamp(min=1)
        down, across = ((place[:, axis] * number).long() for axis, number in enumerate((rows, columns)))
        return down * columns + across


def _ranks(scores: Tensor, group: Tensor, groups: int) -> Tensor:
    """How many of its group [B, N] in `groups` come before each score [B, N], the highest first, ties by index."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    member = one_hot(group.gather(1, order), groups).cumsum(1)  # [B, N, groups]
    before = member.gather(2, group.gather(1, order)[..., None])[..., 0] - 1
    return torch.zeros_like(group).scatter_(1, order, before)
