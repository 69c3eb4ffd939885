"""PyramidDrop: the visual tokens shrink in stages on their way through the language model.

Source: arXiv 2410.17247 (CVPR 2025) and the authors' code. Before layers 8, 16 and 24 of 32 (-> `layers`) the tokens
with the highest attention of the last prompt token stay, int(N lambda^s) of the original N after stage s, lambda = 0.5:
576 -> 288 -> 144 -> 72. The attention row is that of the layer BEHIND the cut: its input norm, query, key and rotary
embedding on everything that enters it, softmax over the causal row, mean over heads (`next_query_attention`);
`query=previous` reads the layer before the cut instead, as FastV does.

Letters: lambda^stages -> `keep_ratio`, what is left after the last stage (0.125 for three stages); the stages between
are its powers. `layers` = None puts three stages at a quarter, a half and three quarters of any model; on the command
line several are written "8 16 24".

Positions are counted anew at every stage, and those of new tokens with them, as in the released code: layers before a
cut keep the numbers that they had. `positions=original` leaves the survivors those of the whole prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy, layer_numbers
from vtp_plugin.tokens import VisualTokens


@dataclass(kw_only=True)
class PyramidDrop(PruningStrategy):
    """Keep, stage by stage, the visual tokens with the highest attention of the last prompt token."""

    name = "pyramiddrop"
    stage = Stage.LLM
    cut_field = "layers"
    paper = "PyramidDrop: Accelerating LVLMs via Pyramid Visual Redundancy Reduction, https://arxiv.org/abs/2410.17247"
    default_keep_ratio = 0.125
    default_positions = "compact"

    layers: str | list[int] | None = None  # first layers without what a stage drops
    query: str = "next"  # next or previous: the layer whose attention row is read

    def validate(self) -> None:
        self.check("layers", self.layers is None or layer_numbers(self.layers) is not None, "must be like '8 16 24'")
        self.check_choice("query", ("next", "previous"))

    @property
    def needs(self) -> tuple[str, ...]:
        return ("next_query_attention" if self.query == "next" else "last_query_attention",)

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        if self.layers is not None:
            return layer_numbers(self.layers)
        return tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)}))

    def wanted(self, visual: VisualTokens) -> int:
        n, (stage, stages) = visual.tokens.shape[1], visual.cut
        entered = visual.entered or n
        last = self.count(entered)
        ratio = self.keep_ratio if self.keep_tokens is None else last / entered
        between = int(entered * ratio ** ((stage + 1) / stages) + 1e-9)
        return min(n, last if stage + 1 == stages else max(last, between))

    def score(self, visual: VisualTokens) -> Tensor:
        return visual.next_query_attention if self.query == "next" else visual.last_query_attention
