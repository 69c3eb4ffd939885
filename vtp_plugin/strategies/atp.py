"""ATP, Adaptive Token Pruning: CLS attention fused with CLIP text-image similarity, between ViT and projector.

Source: arXiv 2512.12701v1, method section (no code exists):
    S_intra(i) = last-layer CLS attention to patch i        -> `cls_attention`, mean over heads
    S_inter(i) = cos(E_ViT(v_i), E_CLIP(T))                 -> cosine of `aligned` and `text`
    S(i)       = alpha N(S_inter(i)) + (1 - alpha) N(S_intra(i)),   V' = TopK(V, K)
alpha -> `alpha`, N(.) -> `normalization`, K = round(r N) with r -> `keep_ratio`, the layer -> `layer`.

Our reading: the printed S_intra sums a softmax row over its keys, which is 1 for every i, so the prose is implemented;
the "unified embedding space" is CLIP's, after its post-layer-norm and visual projection; the paper gives neither alpha,
N nor K, so 0.5, min-max per image and 0.6 (the one row of its table: 256 -> ~150). Patch-text cosines of CLIP are known
to be inverted with respect to localisation: `relevance_sign=-1` turns them round; +1 is the paper as printed. The
question is taken without the chat template and truncated to the text tower's 77 tokens.
alpha = 0 is CLS attention alone, alpha = 1 text similarity alone.
Towers without a class token: the attention that a patch receives, mean over queries, stands in for `cls_attention`.
Towers without a CLIP text tower are refused; `text_encoder=llm` compares projected patches with the question's input
embeddings of the language model instead, which is ours, not the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtp_plugin.selectors import minmax
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import QuestionStrategy
from vtp_plugin.tokens import VisualTokens

EPS = 1e-6


@dataclass(kw_only=True)
class ATP(QuestionStrategy):
    """Keep the patches that the class token looks at and that resemble the question."""

    name = "atp"
    stage = Stage.PROJECTOR
    paper = "Adaptive Token Pruning, https://arxiv.org/abs/2512.12701"
    default_keep_ratio = 0.6

    alpha: float = 0.5  # weight of the text similarity
    layer: int = -1  # block of the vision tower that both signals are read from; -2 is the one LLaVA projects
    relevance_sign: int = 1  # +1 as printed, -1 corrects CLIP's inverted patch-text maps
    normalization: str = "minmax"  # minmax or zscore, per image over its patches

    def validate(self) -> None:
        super().validate()
        self.check_number("alpha", 0, 1)
        self.check("layer", type(self.layer) is int and abs(self.layer) < 1000, "must be a whole number")
        self.check_choice("relevance_sign", (1, -1))
        self.check_choice("normalization", ("minmax", "zscore"))

    @property
    def needs(self) -> tuple[str, ...]:
        return ("cls_attention",) * (self.alpha < 1) + ("aligned", "text") * (self.alpha > 0)

    @property
    def tower_layer(self) -> int:
        return self.layer

    def rounded(self, exact: float) -> int:
        return round(exact)

    def score(self, visual: VisualTokens) -> Tensor:
        score = 0.0
        if self.alpha < 1:
            score = (1 - self.alpha) * self._normalized(visual.cls_attention)
        if self.alpha > 0:
            relevance = cosine_similarity(visual.aligned, visual.text[:, None], dim=-1)  # [B, N]
            score = score + self.alpha * self._normalized(self.relevance_sign * relevance)
        return score

    def _normalized(self, values: Tensor) -> Tensor:
        """N(.) of the paper: [B, N] -> [B, N], per image, in fp32."""
        values = values.float()
        if self.normalization == "zscore":
            return (values - values.mean(-1, keepdim=True)) / (values.std(-1, keepdim=True, correction=0) + EPS)
        return minmax(values)
