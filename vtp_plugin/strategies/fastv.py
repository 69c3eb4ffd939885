"""FastV: drop the visual tokens that the last prompt token ignores, after the second decoder layer.

Source: arXiv 2403.06764 (ECCV 2024), section 4.1 and the authors' inference code:
    phi_i = mean over heads of A^{K-1}[last prompt token, i]   -> `last_query_attention`
K -> `layer` (0-based: the first layer that does not see the dropped tokens), R -> 1 - `keep_ratio`.
The paper's criterion is the attention received from all other tokens; the authors' code uses the last token, as here.
round(N (1-R)) tokens survive and keep their original positions. The prompt is cut once, in the prefill; layers before K
keep their full KV cache. The attention row is recomputed from q and k of layer K-1, so no attention kernel is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import VisualTokens


@dataclass(kw_only=True)
class FastV(PruningStrategy):
    """Keep the visual tokens with the highest attention of the last prompt token."""

    name = "fastv"
    stage = Stage.LLM
    paper = "An Image is Worth 1/2 Tokens After Layer 2, https://arxiv.org/abs/2403.06764"
    needs = ("last_query_attention",)
    default_keep_ratio = 0.5
    default_positions = "original"

    layer: int = 2  # K of the paper

    def validate(self) -> None:
        self.check_whole("layer", 1)

    @property
    def decoder_layer(self) -> int:
        return self.layer

    def rounded(self, exact: float) -> int:
        return round(exact)

    def score(self, visual: VisualTokens) -> Tensor:
        return visual.last_query_attention
