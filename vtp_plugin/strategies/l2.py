"""L2-norm VTP: patch embeddings with a small norm never enter the vision transformer.

Source: the poster "L2-norm Visual Token Pruning" (no paper, no code). Its letters: e_i = the patch convolution's output
(`tokens`), S_i = ||e_i||_2, r = `keep_ratio`, K = int(r N). The class token and the position embeddings are gathered
for the survivors by the machinery, not renumbered.

Our reading, where the poster is silent: the norm is taken before the position embedding is added, in fp32; the class
token is no candidate; K is rounded down; the survivors stay in raster order.
Switches: `center` removes every patch's mean colour before scoring (a flat but bright patch has a large norm
otherwise); `positioned` scores after the position embedding was added.

`at=projector` ranks features behind the tower instead. With judge=before, on models that merge patches, that is plain
rank-before-merge (`l2:before_merge`): s(u) = ||u||_2 of what goes into the merger for a token u, keep round(r N).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import ComparingStrategy
from vtp_plugin.tokens import VisualTokens


@dataclass(kw_only=True)
class L2(ComparingStrategy):
    """Keep the patches whose embedding, or the tokens whose feature, has the largest Euclidean norm."""

    name = "l2"
    paper = "L2-norm Visual Token Pruning (poster)"
    default_keep_ratio = 0.5

    at: str = "vit"  # the stage: vit or projector
    center: bool = False  # score the embedding of the patch minus its mean colour
    positioned: bool = False  # score after adding the position embedding

    def validate(self) -> None:
        self.check_choice("at", ("vit", "projector"))
        self.check_choice("center", (True, False))
        self.check_choice("positioned", (True, False))
        for field in ("center", "positioned"):
            self.check(field, self.at == "vit" or not getattr(self, field), "is for at=vit")
        self.check("positioned", not (self.center and self.positioned), "cannot be combined with center")

    def rounded(self, exact: float) -> int:
        return int(exact) if self.at == "vit" else round(exact)

    @property
    def stage(self) -> Stage:
        return Stage(self.at)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("centered",) * self.center + ("positioned",) * self.positioned + self.reads()

    def score(self, visual: VisualTokens) -> Tensor:
        scored = visual.centered if self.center else visual.positioned if self.positioned else visual.tokens
        return self.judged(visual, scored).float().norm(dim=-1)
