"""vtp: tokens that cover the picture, then tokens that keep its proportions; the strategy of this package.

Source: this package. x_i are the projected tokens (at=llm: hidden states after the final norm), and their likeness is
k_ij = exp(-|x_i - x_j|^2 / (scale m)), m the median of |x_i - x_j|^2 over all pairs of the image,
in steps of 2^-12. The fewer stay, the more each of them stands for, and the scale grows: max(1/4, N / 18 K).
1. coverage: S grows by argmax_j u_j^focus sum_i max(0, k_ij - max_{s in S} k_is), facility location: every token has
   one like it among those that stay, so rare things stay;
2. proportion: S grows by argmax_j (|S| + 1) mean_i k_ij - sum_{s in S} k_sj, kernel herding (arXiv 1203.3472): what
   stays is distributed as the picture is, so frequent things stay frequent.
K = round(r N) tokens stay, round(`proportion` K) of them by step 2, none if that share is less than one token; None
makes the share K / N: the scarcer tokens are, the more of them are spent on coverage.
What stays keeps the position that it had in the whole prompt; `positions=compact` counts anew.

Why: attention averages over the tokens that it finds alike, so what is left must keep the proportions of the picture.
Every method that ranks by importance, and every one that only covers or diversifies, raises the share of object tokens,
and the embedded model then miscounts. `focus` weighs step 1 by importance, u = 0.1 + min-max per image of the CLS
attention (at=llm: the attention of the last prompt token); the default 0 reads neither, because importance lowered
accuracy. The choices were made on validation scenes, never on the test scenes (docs/fidelity.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtp_plugin.selectors import gaussian, herding, minmax, stepped_coverage
from vtp_plugin.strategy import ComparingStrategy, PlacedStrategy
from vtp_plugin.tokens import Selection, VisualTokens

FLOOR = 0.1  # importance that every token has
NARROW, SHARE = 0.25, 18  # the smallest scale, and N / SHARE K where that is more


@dataclass(kw_only=True)
class VTP(PlacedStrategy, ComparingStrategy):
    """Keep tokens that cover the picture, and as many of each kind as it has."""

    name = "vtp"
    paper = "this package"
    default_keep_ratio = 0.25
    default_positions = "original"

    places = ("projector", "llm")

    proportion: float | None = None  # share of the kept tokens that restore the proportions; None: K / N
    scale: float | None = None  # squared distance up to which tokens are alike, in medians; None: by how many stay
    focus: float = 0.0  # exponent of the importance; 0 reads none

    def validate(self) -> None:
        super().validate()
        if self.proportion is not None:
            self.check_number("proportion", 0, 1)
        if self.scale is not None:
            self.check_number("scale", 1e-3, 1e3)
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
        k, n = self.wanted(visual), visual.tokens.shape[1]
        alike = gaussian(self.judged(visual, getattr(visual, self._features)), self.width(k, n))
        covering = stepped_coverage(alike, self.weight(visual, alike), self.covering(k, n))
        return Selection.of(herding(alike, covering, k), n)

    def width(self, k: int, n: int) -> float:
        """The scale for k tokens of n, in medians."""
        return max(NARROW, n / (SHARE * k)) if self.scale is None else self.scale

    def covering(self, k: int, n: int) -> int:
        """How many of k tokens of n are picked to cover, at least one; a share below one token restores nothing."""
        restoring = k * (k / n if self.proportion is None else self.proportion)
        return max(1, k - round(restoring)) if restoring >= 1 else k

    def weight(self, visual: VisualTokens, alike: Tensor) -> Tensor:
        """u^focus of every token, [B, N]."""
        if self.focus == 0:
            return torch.ones_like(alike[:, 0])
        return (minmax(getattr(visual, self._importance)) + FLOOR) ** self.focus
