"""PixelPrune: blocks of raw pixels that their neighbours predict never enter the model.

Source: arXiv 2604.00886. Raster scan over blocks of pixels in [0, 1] with the causal neighbours A = left, B = above,
C = above left, as in JPEG-LS: the predictor is A, but B where C is like A and not like B (a vertical edge); the first
row is predicted from the left, the first column from above; the block in the corner always stays. A block is dropped
when its distance to its predictor is <= tau -> `threshold`. For tau > 0 a dropped block counts as the block that it was
predicted from, so that errors do not add up. Distance: largest difference, mean difference or root of the mean square
-> `distance`. The default tau = 0 drops exact repetitions only (documents, screens). Survivors keep their positions.

Our reading: "like" is a distance <= tau, too, on the values that neighbours count as; a block is `block` x `block`
patches that stay or leave together: 1 where one patch is one token (CLIP), 2 in the paper's models, which merge 2 x 2.
A block with a patch that an earlier strategy dropped predicts nothing and is not predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens


@dataclass(kw_only=True)
class PixelPrune(PruningStrategy):
    """Drop blocks of pixels that repeat the block beside or above; how many is up to the image."""

    name = "pixelprune"
    stage = Stage.PIXELS
    paper = "PixelPrune, https://arxiv.org/abs/2604.00886"
    needs = ("pixels",)
    budgeted = False

    threshold: float = 0.0  # tau, of pixels in [0, 1]
    distance: str = "max"  # max, mae or rmse
    block: int = 1  # patches per side of a block

    def validate(self) -> None:
        self.check_number("threshold", 0, 1)
        self.check_choice("distance", ("max", "mae", "rmse"))
        self.check_whole("block", 1)

    def select(self, visual: VisualTokens) -> Selection:
        images = zip(visual.pixels, visual.index, strict=True)
        return Selection(torch.stack([self._keep(pixels, index, visual.grid) for pixels, index in images]))

    def _keep(self, pixels: Tensor, index: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mask [N] of one image's patches [N, 3, p, p] at raster positions `index`."""
        rows, cols = (-(-side // self.block) for side in grid)
        row, col = index // grid[1], index % grid[1]
        inside = row % self.block * self.block + col % self.block
        values = pixels.new_zeros(rows, cols, self.block**2, pixels[0].numel(), dtype=torch.float32)
        seen = torch.zeros(values.shape[:3], dtype=torch.bool, device=index.device)
        place = (row // self.block, col // self.block, inside)
        values[place], seen[place] = pixels.flatten(1).float() / 255, torch.ones_like(index, dtype=torch.bool)
        return self._scan(values.flatten(2), seen.all(-1))[place[:2]]

    def _scan(self, values: Tensor, whole: Tensor) -> Tensor:
        """Which blocks stay, [R, C], from their values [R, C, V]; diagonal by diagonal, since A, B, C lie before."""
        rows, cols, _ = values.shape
        counted, keep = values.clone(), torch.ones_like(whole)
        for diagonal in range(1, rows + cols - 1):
            u = torch.arange(max(0, diagonal - cols + 1), min(rows, diagonal + 1), device=values.device)
            v = diagonal - u
            pu, pv = self._predictor(counted, u, v)
            close = self._like(values[u, v], counted[pu, pv]) & whole[u, v] & whole[pu, pv]
            keep[u, v] = ~close
            counted[u, v] = torch.where(close[:, None], counted[pu, pv], values[u, v])
        return keep

    def _predictor(self, counted: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of the neighbour that predicts each block (u, v)."""
        left, up = (v - 1).clamp(min=0), (u - 1).clamp(min=0)
        corner = counted[up, left]
        edge = self._like(corner, counted[u, left]) & ~self._like(corner, counted[up, v])
        above = (v == 0) | ((u > 0) & edge)
        return torch.where(above, up, u), torch.where(above, v, left)

    def _like(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether blocks [M, V] are as close as the threshold says."""
        difference = (a - b).abs()
        measure = {
            "max": lambda: difference.amax(-1),
            "mae": lambda: difference.mean(-1),
            "rmse": lambda: difference.square().mean(-1).sqrt(),
        }[self.distance]
        return measure() <= self.threshold
