"""SCOPE: salience times coverage, greedily.

Source: arXiv 2510.24214 (NeurIPS 2025): w_i = (CLS attention of the projected block)^alpha, alpha -> `alpha`; repeat K
times: gain_j = w_j sum_i max(0, cos(x_i, x_j) - cur_i), take the largest, cur_i <- max(cur_i, cos(x_i, x_j*)), cur = 0
at first, over the features before the projector. Ascending order, no CLS token, no merging, positions renumbered.

`gain=additive` is the code's alternative: gain_j = w_j + sum_i max(0, ...), which lets salience in without coverage.
There the attention is the sum over heads, `heads` times the mean; the product does not see that factor.

Our reading: fp32; the budget is per image (the released code divides it by the number of images of the batch). K =
int(r N).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtp_plugin.selectors import cosines, coverage
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import ComparingStrategy
from vtp_plugin.tokens import Selection, VisualTokens


@dataclass(kw_only=True)
class SCOPE(ComparingStrategy):
    """Keep salient tokens that cover what the kept ones do not."""

    name = "scope"
    stage = Stage.PROJECTOR
    paper = "SCOPE: Saliency-Coverage Oriented Token Pruning, https://arxiv.org/abs/2510.24214"
    default_keep_ratio = 64 / 576

    alpha: float = 1.0  # exponent of the attention; 0 is coverage alone
    gain: str = "product"  # product or additive: how salience and coverage are joined

    @property
    def needs(self) -> tuple[str, ...]:
        return ("cls_attention", *self.reads()) + ("heads",) * (self.gain == "additive")

    def validate(self) -> None:
        self.check_choice("gain", ("product", "additive"))
        self.check_number("alpha", 0)

    def select(self, visual: VisualTokens) -> Selection:
        attention = visual.cls_attention.float()
        if self.gain == "product":
            factor, bonus = attention**self.alpha, None
        else:
            factor, bonus = torch.ones_like(attention), (visual.heads * attention) ** self.alpha
        alike = cosines(self.judged(visual, visual.tokens))
        picks = coverage(alike, factor, self.wanted(visual), bonus=bonus)
        return Selection.of(picks, visual.tokens.shape[1], scores=attention**self.alpha)
