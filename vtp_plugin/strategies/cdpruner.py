"""CDPruner: diverse tokens, conditioned on the question, by a determinantal point process.

Source: arXiv 2506.10967 (NeurIPS 2025) and the authors' code:
1. L_ij = cos(z_i, z_j) of the projected tokens (`projected`), fp32;
2. relevance_i = cosine of patch i (block of the projected features, CLIP's post-layer-norm and visual projection:
   `aligned`) and the question (`text`). The paper describes it as it is; the code NEGATES it, because CLIP's patch-text
   maps are inverted: `relevance_sign` = -1 is the code, +1 the paper;
3. r_i = (relevance_i - min + 1e-6) / (max - min) per image, L~ = diag(r) L diag(r);
4. greedy MAP of the DPP of L~ with K picks (Cholesky recursion, O(N K^2)), ascending order, positions renumbered.

Our reading: with K above the rank of L the recursion has nothing left to pick (the released code then returns NaN and
fewer than K tokens); the rest is taken by the highest relevance. Equal relevances count as 1. K = int(r N).

A question above the text tower's 77 tokens is cut into pieces of 77, as in the code (start token in the first, end
token in the last, zeros behind it), and the cosines with the pieces are averaged; `segments=false` truncates instead.
A piece without an end token is read where transformers' CLIP reads it, which is its first token, or that of the highest
id with a configuration from before the end token was corrected. The mean of cosines is the cosine with the mean of unit
vectors times its length: the length drops out of r, but for the 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtp_plugin.selectors import cosines, determinantal
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import ComparingStrategy, QuestionStrategy
from vtp_plugin.tokens import Selection, VisualTokens

EPS = 1e-6


@dataclass(kw_only=True)
class CDPruner(QuestionStrategy, ComparingStrategy):
    """Keep tokens that differ from each other and matter to the question."""

    name = "cdpruner"
    stage = Stage.PROJECTOR
    paper = "CDPruner: Maximizing Conditional Diversity for Token Pruning, https://arxiv.org/abs/2506.10967"
    default_keep_ratio = 64 / 576

    relevance_sign: int = -1  # -1 as in the code, +1 as in the paper
    segments: bool = True  # a question above 77 tokens: cosines averaged over pieces; false: truncated

    def validate(self) -> None:
        super().validate()
        self.check_choice("relevance_sign", (1, -1))
        self.check_choice("segments", (True, False))

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.reads("projected"), "aligned", "text")

    def select(self, visual: VisualTokens) -> Selection:
        relevance = self.relevance_sign * cosine_similarity(visual.aligned, visual.text[:, None], dim=-1)
        r = _scaled(relevance)
        kernel = cosines(self.judged(visual, visual.projected)).mul_(r[:, :, None]).mul_(r[:, None])
        picks = determinantal(kernel, self.wanted(visual), fallback=relevance)
        return Selection.of(picks, r.shape[1], scores=relevance)


def _scaled(relevance: Tensor) -> Tensor:
    """r of the paper, [B, N]; 1 where all relevances are equal."""
    low, high = relevance.amin(-1, keepdim=True), relevance.amax(-1, keepdim=True)
    return ((relevance - low + EPS) / (high - low).clamp(min=EPS)).where(high > low, 1)
