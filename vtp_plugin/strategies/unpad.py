"""unpad: drop what the image processor added around a picture; nothing of the picture itself is lost.

Source: no paper, a control. LLaVA-1.5 pads pictures to squares with CLIP's mean colour, so that of a 4:3 photograph a
quarter of the patches holds nothing, and whatever a method saves on such pictures has to be held against this.
A row or a column of patches at the edge is padding when all of its pixels have the colour `color` (up to one level,
which normalising and resizing may cost), and so are the rows or columns behind it, one after the other, as long as they
are; a patch that also holds a part of the picture stays, be it a third of a pixel. Resizing with a bicubic filter blurs
the picture's edge into the padding, so the two rows of pixels of a patch that face the picture may be off by up to
`blur` levels (without that, of the three rows of patches above a photograph of 640 x 480 only two would go); pictures
that are enlarged blur further, and their last row of padding may stay. `color`: clip, CLIP's mean colour as LLaVA
rounds it; black, white, gray. Positions are those that the family gives to a shortened prompt.

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
RIM = 2  # rows of pixels that a bicubic filter reaches beyond an edge


@dataclass(kw_only=True)
class Unpad(PruningStrategy):
    """Drop the patches that lie wholly in the padding around a picture."""

    name = "unpad"
    stage = Stage.PIXELS
    paper = "a control of this package: the padding that the image processor added"
    needs = ("pixels",)
    budgeted = False

    color: str = "clip"  # of the padding: clip, black, white or gray
    blur: int = 20  # levels by which the two rows of pixels beside the picture may be off

    def validate(self) -> None:
        self.check_choice("color", COLORS)
        self.check_whole("blur", 0)
        self.check("blur", self.blur <= 255, "must be at most 255")

    def select(self, visual: VisualTokens) -> Selection:
        color = torch.tensor(COLORS[self.color], device=visual.pixels.device).view(3, 1, 1)
        off = (visual.pixels.int() - color).abs().amax(2)  # [B, N, p, p]
        rows = self._ends(off, visual.index // visual.grid[1], visual.grid[0])
        columns = self._ends(off.transpose(2, 3), visual.index % visual.grid[1], visual.grid[1])
        keep = ~(rows | columns)
        keep[:, 0] |= ~keep.any(1)
        return Selection(keep)

    def _ends(self, off: Tensor, place: Tensor, length: int) -> Tensor:
        """Which patches [B, N] lie in rows `place` [B, N] that are padding, from the first on or from the last on."""
        limit = torch.full((off.shape[2],), TOLERANCE, device=off.device)
        limit[-RIM:] = max(TOLERANCE, self.blur)  # where the picture is below
        padding = torch.zeros_like(place, dtype=torch.bool)
        for allowed, order in ((limit, 0), (limit.flip(0), 1)):
            filled = torch.zeros(len(place), length, dtype=torch.int, device=off.device)
            full = filled.scatter_add_(1, place, (off > allowed[:, None]).flatten(2).any(-1).int()) == 0
            edge = (full.flip(1) if order else full).int().cumprod(1)
            padding |= (edge.flip(1) if order else edge).gather(1, place) > 0
        return padding
