"""Downsample: the picture at a lower resolution, with as many patches as the budget allows; a control.

Source: VTC-Bench (arXiv 2510.07143), which finds that plain image resizing beats most pruning methods at the same
number of tokens.
For K = r x c the picture is resized to r x c patches (bicubic with antialiasing, levels rounded to uint8) and position
embeddings are interpolated (bilinear) to the middle of every new patch. The same rule meets every K exactly: the
picture is cut into round(sqrt(K rows / columns)) strips of equal height, and each strip, resized to its share of the K
patches, has equal widths; the shares differ by one at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vtp_plugin.selectors import strip_counts
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens


@dataclass(kw_only=True)
class Downsample(PruningStrategy):
    """Keep the whole picture, at a lower resolution."""

    name = "downsample"
    stage = Stage.PIXELS
    paper = "control, as in VTC-Bench, https://arxiv.org/abs/2510.07143"
    needs = ("pixels",)
    merges = True
    default_keep_ratio = 0.25

    filter: str = "bicubic"  # bicubic or bilinear

    def validate(self) -> None:
        self.check_choice("filter", ("bicubic", "bilinear"))

    def select(self, visual: VisualTokens) -> Selection:
        (rows, cols), size = visual.grid, visual.pixels.shape[-1]
        if visual.pixels.shape[1] != rows * cols:
            raise self.error("it resizes the whole picture, so no strategy may drop patches before it")
        if visual.pixels.shape[-2] != size:
            raise self.error("it resizes pictures, and the patches of this video are of several frames")
        counts = strip_counts(visual.grid, self.wanted(visual))
        picture = _assembled(visual.pixels, visual.index, visual.grid)
        resized = {n: self._resized(picture, len(counts) * size, n * size) for n in set(counts)}
        patches, places = [], []
        for strip, number in enumerate(counts):
            band = resized[number][:, :, strip * size : (strip + 1) * size]  # [B, 3, p, n p]
            patches.append(band.unfold(3, size, size).permute(0, 3, 1, 2, 4).flatten(2))  # [B, n, 3 p p]
            across = (torch.arange(number, device=picture.device) + 0.5) * cols / number - 0.5
            places.append(torch.stack([torch.full_like(across, (strip + 0.5) * rows / len(counts) - 0.5), across], 1))
        return self._selection(visual, torch.cat(patches, 1), torch.cat(places))

    def _resized(self, picture: Tensor, height: int, width: int) -> Tensor:
        return interpolate(picture, (height, width), mode=self.filter, antialias=True).round().clamp(0, 255)

    def _selection(self, visual: VisualTokens, patches: Tensor, places: Tensor) -> Selection:
        """New patches [B, K, 3 p p] at places [K, 2], each standing where the nearest old one was."""
        nearest = (places + 0.5 - 1e-4).floor().long()
        raster = nearest[:, 0] * visual.grid[1] + nearest[:, 1]
        column = torch.empty_like(visual.index).scatter_(
            1, visual.index, torch.arange(visual.index.shape[1], device=raster.device).expand_as(visual.index)
        )
        sources = column[:, raster]
        keep = torch.zeros_like(visual.index, dtype=torch.bool).scatter_(1, sources, True)
        return Selection(keep, tokens=tuple(patches), source=tuple(sources), places=(places,) * len(patches))


def _assembled(pixels: Tensor, index: Tensor, grid: tuple[int, int]) -> Tensor:
    """The pictures [B, 3, H, W] of patches [B, N, 3, p, p] at raster positions `index`."""
    size, order = pixels.shape[-1], index.argsort(dim=1)
    ordered = torch.stack([one[own] for one, own in zip(pixels, order, strict=True)]).float()
    tiles = ordered.unflatten(1, grid)  # [B, rows, cols, 3, p, p]
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(pixels), 3, grid[0] * size, grid[1] * size)
