"""vtp: tokens that differ, then tokens that restore the picture's average; the strategy of this package.

Source: this package. x_i are the projected tokens (at=llm: hidden states after the final norm) minus their mean.
1. difference: S grows by argmax_j u_j^focus min_{s in S} |x_j - x_s|^2, from the token with the farthest nearest
   neighbour, as DivPrune with Euclidean distances: rare things stay;
2. proportion: S grows by argmin_j |x_j + sum_{s in S} x_s|, the token that brings the mean of the kept tokens closest
   to the mean of all (kernel herding, arXiv 1203.3472, with a linear kernel): frequent things stay frequent.
K = round(r N) tokens stay, round(`proportion` K) of them by step 2; None makes the share r itself: the scarcer tokens
are, the more of them are spent on difference.
What stays keeps the position that it had in the whole prompt; `positions=compact` counts anew.

Why: attention averages over the tokens that it finds alike, so what is left must keep the proportions of the picture.
Every method that ranks by importance, and every one that only diversifies, raises the share of object tokens, and the
embedded model then miscounts. `focus` weighs step 1 by importance, u = 0.1 + min-max per image of the CLS
attention (at=llm: the attention of the last prompt token); the default 0 reads neither, because importance lowered
accuracy. The choices were made on validation scenes, never on the test scenes (docs/fidelity.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtp_plugin.selectors import centred, distances, farthest_points, mean_matching, minmax
from vtp_plugin.strategy import ComparingStrategy, PlacedStrategy
from vtp_plugin.tokens import Selection, VisualTokens

FLOOR = 0.1  # importance that every token has


@dataclass(kw_only=True)
class VTP(PlacedStrategy, ComparingStrategy):
    """Keep tokens that differ, and as many of each kind as the picture has."""

    name = "vtp"
    paper = "this package"
    default_keep_ratio = 0.25
    default_positions = "original"

    places = ("projector", "llm")

    proportion: float | None = None  # share of the kept tokens that restore the mean; None: K / N
    focus: float = 0.0  # exponent of the importance; 0 reads none

    def validate(self) -> None:
        super().validate()
        if self.proportion is not None:
            self.check_number("proportion", 0, 1)
        self.check_number("focus", 0)

    @property
    def needs(self) -> tuple[str, ...]:
        return self.reads(self._features) + (self._importance,) * (self.focus > 0)

    @property
    def _features(self) -> str:
        return "normed" if self.at == "llm" else "projected"

    @property
    def _importance(self) -> str:
        return "last_query_attention" if self.at == "llm" else "cls_attention"

    def rounded(self, exact: float) -> int:
        return round(exact)

    def select(self, visual: VisualTokens) -> Selection:
        x, k = centred(self.judged(visual, getattr(visual, self._features))), self.wanted(visual)
        picks = farthest_points(distances(x), self.different(k, x.shape[1]), self.weight(visual))
        return Selection.of(mean_matching(x, picks, k), x.shape[1])

    def different(self, k: int, n: int) -> int:
        """How many of k tokens of n are picked by their difference, at least one."""
        share = k / n if self.proportion is None else self.proportion
        return max(1, k - round(share * k))

    def weight(self, visual: VisualTokens) -> Tensor | None:
        """u^focus of every token, [B, N]."""
        if self.focus == 0:
            return None
        return (minmax(getattr(visual, self._importance)) + FLOOR) ** self.focus
