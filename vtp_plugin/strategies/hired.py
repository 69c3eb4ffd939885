"""HiRED: a token budget, spent by CLS attention.

Source: arXiv 2408.10945 (AAAI 2025). For one view (LLaVA-1.5) the method is the top int(rate N) patches by the CLS
attention of the projected block (sum over heads, which ranks as the mean does): rate -> `keep_ratio`, 0.2 by default,
115 of 576.

Not here: the division of one budget among the sub-images of a high-resolution picture (alpha, first-block attention on
the base view), because no family of this package hands over several views of one picture yet. With one view HiRED
differs from FasterVLM only by the rounding and by the default.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import VisualTokens


@dataclass(kw_only=True)
class HiRED(PruningStrategy):
    """Keep the patches with the highest CLS attention; the form for pictures of a single view."""

    name = "hired"
    stage = Stage.PROJECTOR
    paper = "HiRED: High-Resolution Early Dropping, https://arxiv.org/abs/2408.10945"
    needs = ("cls_attention",)
    default_keep_ratio = 0.2

    def score(self, visual: VisualTokens) -> Tensor:
        return visual.cls_attention
