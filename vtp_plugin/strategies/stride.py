"""Stride: uniform sampling in raster order, the control that a 2026 re-run found ahead of several methods.

Kept columns: floor(i N / K), i = 0 ... K-1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtp_plugin.strategy import PlacedStrategy
from vtp_plugin.tokens import Selection, VisualTokens


@dataclass(kw_only=True)
class Stride(PlacedStrategy):
    """Keep evenly spaced tokens."""

    name = "stride"
    paper = "control"

    def select(self, visual: VisualTokens) -> Selection:
        n = visual.tokens.shape[1]
        k = self.count(n)
        columns = torch.arange(k, device=visual.index.device) * n // k
        return Selection.of(columns.expand(len(visual.index), k), n)
