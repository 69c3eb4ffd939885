"""vtp: importance with redundancy control, the strategy of this package.

Source: this package; importance as in ATP (arXiv 2512.12701), of the projected block:
u_i = (1 - alpha) N(CLS attention) + alpha N(sign cos(patch, question)),
N is min-max per image; `alpha`, `relevance_sign`. Redundancy is what the evidence says matters more than the score:
* control=coverage: weighted facility location, gain_j = u_j sum_i u_i max(0, cos(x_i, x_j) - covered_i): important
  tokens that stand for many important ones;
* control=determinantal: greedy MAP of the determinantal point process with kernel u_i cos(x_i, x_j) u_j;
* control=none: the K most important ones, as ATP.
`focus` is an exponent of u, `floor` is added before it, so that no token counts for nothing.
Nothing is trained, and alpha=0 needs no text tower. K = round(r N), raster order.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtp_plugin.selectors import cosines, coverage, determinantal, mask, minmax
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import QuestionStrategy
from vtp_plugin.tokens import Selection, VisualTokens, top_k


@dataclass(kw_only=True)
class VTP(QuestionStrategy):
    """Keep important tokens that stand for the others."""

    name = "vtp"
    stage = Stage.PROJECTOR
    paper = "this package"
    default_keep_ratio = 0.25

    alpha: float = 0.5  # weight of the question
    relevance_sign: int = -1  # -1 corrects CLIP's inverted patch-text maps, +1 takes them as they are
    control: str = "coverage"  # coverage, determinantal or none
    focus: float = 1.0  # exponent of the importance
    floor: float = 0.1  # importance that every token has

    def validate(self) -> None:
        super().validate()
        self.check_number("alpha", 0, 1)
        self.check_choice("relevance_sign", (1, -1))
        self.check_choice("control", ("coverage", "determinantal", "none"))
        self.check_number("focus", 0)
        self.check_number("floor", 0)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("cls_attention",) * (self.alpha < 1) + ("aligned", "text") * (self.alpha > 0)

    def rounded(self, exact: float) -> int:
        return round(exact)

    def select(self, visual: VisualTokens) -> Selection:
        importance, k = self.importance(visual), self.wanted(visual)
        if self.control == "none":
            return Selection(top_k(importance, k), scores=importance)
        similarity = cosines(visual.tokens)
        if self.control == "coverage":
            picks = coverage(similarity, importance, k, demand=importance)
        else:
            kernel = importance[:, :, None] * similarity * importance[:, None]
            picks = determinantal(kernel, k, spare=importance)
        return Selection(mask(picks, importance.shape[1]), scores=importance)

    def importance(self, visual: VisualTokens) -> Tensor:
        """u of every token, [B, N]."""
        u = 0.0
        if self.alpha < 1:
            u = (1 - self.alpha) * minmax(visual.cls_attention)
        if self.alpha > 0:
            relevance = cosine_similarity(visual.aligned, visual.text[:, None], dim=-1)
            u = u + self.alpha * minmax(self.relevance_sign * relevance)
        return (u + self.floor) ** self.focus
