"""unpad: drop what the image processor added around a picture; nothing of the picture itself is lost.

No paper: a control. LLaVA-1.5 pads pictures to squares with CLIP's mean colour, so that of a 4:3 photograph a quarter of
the patches holds nothing, and whatever a method saves on such pictures has to be held against this.
A row or a column of patches at the edge is padding when all of its pixels have the colour `color` (within `tolerance`
levels), and so are the rows or columns behind it, one after the other, as long as they are; a patch that also holds a
part of the picture stays. Positions are those that the family gives to a shortened prompt.

A picture that is of that colour everywhere keeps its first patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens


@dataclass(kw_only=True)
class Unpad(PruningStrategy):
    """Drop the patches that lie wholly in the padding around a picture."""

    name = "unpad"
    stage = Stage.PIXELS
    paper = "a control of this package: the padding that the image processor added"
    needs = ("pixels",)
    budgeted = False

    color: str = "122 116 104"  # red, green, blue of the padding: CLIP's mean colour, as LLaVA rounds it
    tolerance: int = 1  # levels of 255

    def validate(self) -> None:
        self.check("color", _levels(self.color) is not None, "must be three whole numbers in 0 ... 255, as '0 0 0'")
        self.check_whole("tolerance", 0)

    def select(self, visual: VisualTokens) -> Selection:
        color = torch.tensor(_levels(self.color), device=visual.pixels.device).view(3, 1, 1)
        blank = ((visual.pixels.int() - color).abs() <= self.tolerance).flatten(2).all(-1)  # [B, N]
        keep = torch.stack(
            [~self._padding(row, index, visual.grid) for row, index in zip(blank, visual.index, strict=True)]
        )
        keep[:, 0] |= ~keep.any(1)
        return Selection(keep)

    def _padding(self, blank: Tensor, index: Tensor, grid: tuple[int, int]) -> Tensor:
        """Which patches [N] lie in rows or columns that are blank from the edge on."""
        places = torch.stack([index.clamp(min=0) // grid[1], index.clamp(min=0) % grid[1]])
        padding = torch.zeros_like(blank)
        for place, length in zip(places, grid, strict=True):
            full = torch.ones(length, dtype=torch.bool, device=blank.device)
            full[place[~blank]] = False
            edge = full.int().cumprod(0).bool() | full.int().flip(0).cumprod(0).flip(0).bool()
            padding |= edge[place]
        return padding


def _levels(color: object) -> list[int] | None:
    """Three levels of a colour, or None."""
    parts = color.split() if isinstance(color, str) else []
    levels = [int(part) for part in parts if part.isdigit() and int(part) <= 255]
    return levels if len(levels) == len(parts) == 3 else None
