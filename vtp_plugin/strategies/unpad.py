"""unpad: drop what the image processor added around a picture; nothing of the picture itself is lost.

Source: no paper, a control. LLaVA-1.5 pads pictures to squares with CLIP's mean colour, so that of a 4:3 photograph a
quarter of the patches holds nothing, and whatever a method saves on such pictures has to be held against this.
A row or a column of patches at the edge is padding when all of its pixels have the colour `color` (up to one level,
which normalising and resizing may cost), and so are the rows or columns behind it, one after the other, as long as they
are; a patch that also holds a part of the picture stays. `color`: clip, CLIP's mean colour as LLaVA rounds it; black,
white, gray. Positions are those that the family gives to a shortened prompt.

A picture that is of that colour everywhere keeps its first patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens

COLORS = {"clip": (122, 116, 104), "black": (0, 0, 0), "white": (255, 255, 255), "gray": (127, 127, 127)}
TOLERANCE = 1  # levels of 255


@dataclass(kw_only=True)
class Unpad(PruningStrategy):
    """Drop the patches that lie wholly in the padding around a picture."""

    name = "unpad"
    stage = Stage.PIXELS
    paper = "a control of this package: the padding that the image processor added"
    needs = ("pixels",)
    budgeted = False

    color: str = "clip"  # of the padding: clip, black, white or gray

    def validate(self) -> None:
        self.check_choice("color", COLORS)

    def select(self, visual: VisualTokens) -> Selection:
        levels = zip(visual.pixels.int().unbind(2), COLORS[self.color], strict=True)
        like = [((channel - level).abs() <= TOLERANCE).flatten(2).all(-1) for channel, level in levels]
        keep = ~_padding(torch.stack(like).all(0), visual.index, visual.grid)
        keep[:, 0] |= ~keep.any(1)
        return Selection(keep)


def _padding(blank: Tensor, index: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which patches [B, N] lie in rows or columns that are blank from the edge on."""
    padding = torch.zeros_like(blank)
    for place, length in ((index // grid[1], grid[0]), (index % grid[1], grid[1])):
        filled = torch.zeros(len(blank), length, dtype=torch.int, device=blank.device)
        full = (filled.scatter_add_(1, place, (~blank).int()) == 0).int()
        edge = full.cumprod(1) + full.flip(1).cumprod(1).flip(1)
        padding |= edge.gather(1, place) > 0
    return padding
