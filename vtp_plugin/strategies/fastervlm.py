"""FasterVLM: the patches that the class token looks at, nothing else.

Source: arXiv 2412.01818v1: a_i = mean over heads of A[CLS, i] in the block whose output is projected
(`cls_attention`), top-K, ascending; CLS itself is dropped; positions are renumbered. K is given there as 144, 58, 29 of
576, that is round(r N). It is VisionZip's dominant part without the CLS token and without merging.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import VisualTokens


@dataclass(kw_only=True)
class FasterVLM(PruningStrategy):
    """Keep the patches with the highest CLS attention."""

    name = "fastervlm"
    stage = Stage.PROJECTOR
    paper = "[CLS] Attention is All You Need for Training-Free Visual Token Pruning, https://arxiv.org/abs/2412.01818v1"
    needs = ("cls_attention",)
    default_keep_ratio = 0.25

    def rounded(self, exact: float) -> int:
        return round(exact)

    def score(self, visual: VisualTokens) -> Tensor:
        return visual.cls_attention
