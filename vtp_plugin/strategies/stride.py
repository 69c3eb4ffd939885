"""Stride: uniform sampling in raster order, the control that a 2026 re-run found ahead of several methods.

Kept columns: floor(i N / K), i = 0 ... K-1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens


@dataclass(kw_only=True)
class Stride(PruningStrategy):
    """Keep evenly spaced tokens."""

    name = "stride"
    paper = "control"

    at: str = "projector"  # the stage: vit, projector or llm
    layer: int = 2  # for at=llm: the first decoder layer that does not see the dropped tokens

    def validate(self) -> None:
        self.check_choice("at", ("vit", "projector", "llm"))
        self.check_whole("layer", 1)

    @property
    def stage(self) -> Stage:
        return Stage(self.at)

    @property
    def decoder_layer(self) -> int | None:
        return self.layer if self.stage is Stage.LLM else None

    def select(self, visual: VisualTokens) -> Selection:
        n = visual.tokens.shape[1]
        k = self.count(n)
        keep = torch.zeros_like(visual.index, dtype=torch.bool)
        keep[:, torch.arange(k, device=keep.device) * n // k] = True
        return Selection(keep)
