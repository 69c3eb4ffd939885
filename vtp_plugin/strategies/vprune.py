"""V-PRUNE: in every 2x2 group of patches, a patch that repeats a kept one is dropped before it is embedded.

Source: Appl. Sci. 2025, 15(17), 9463, doi 10.3390/app15179463, section 3. Its formulas are not at hand and no code was
published, so this is a RECONSTRUCTION from the abstract, headings and tables; every choice below is our reading and has
a switch. The thresholds are confirmed by the removed shares: photographs of 4:3, padded as LLaVA-1.5 pads, lose about
what the article prints for COCO's at chi-square 5, 10 and 20 (`vtp study vprune-design`, which shows the other readings
beside it, and that most of it is the padding). The histogram itself is not known: `vtp calibrate vprune` finds the
cosine threshold for a removed share. What the article states: patch groups (2x2), chi-square distance of colour
histograms with thresholds 5/10/20 (a larger one removes more), cosine similarity with a threshold of its own, removed
shares of 13-37 %.

1. division: patches (g u + a, g v + b), a, b < g -> `group`;
2. per patch the colour histogram, raw counts, `bins` per channel (bin of v: v * bins // 256), channels concatenated,
   in `color_space`; and the colour vector of the cosine test -> `vector`: all pixels, their mean, or pixels - mean;
3. redundant(i, j) = [chi2 <= chi2_threshold] AND [cos >= cosine_threshold] -> `combine`;
   chi2 = sum_b (h_i - h_j)^2 / (h_i + h_j), or / h_i with `chi2_form=asymmetric` (OpenCV's); identical patches are
   redundant, also where the cosine is 0/0;
4. raster order inside the group: a patch is dropped when redundant with a kept one -> `survivor=first`; `variance`
   visits the patches by falling pixel variance; `all` drops a patch only if it is redundant with every other one,
   the first always stays;
5. the survivors, in raster order, are embedded with their original positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens

EPS = 1e-12


@dataclass(kw_only=True)
class VPrune(PruningStrategy):
    """Drop patches that repeat a neighbour of their group; how many is up to the image."""

    name = "vprune"
    stage = Stage.PIXELS
    paper = "V-PRUNE, https://doi.org/10.3390/app15179463"
    needs = ("pixels",)
    budgeted = False

    chi2_threshold: float = 5.0
    cosine_threshold: float = 0.95
    group: int = 2
    bins: int = 8
    color_space: str = "rgb"  # rgb or hsv
    combine: str = "and"  # and, or, chi2, cosine
    chi2_form: str = "symmetric"  # symmetric or asymmetric
    vector: str = "pixels"  # pixels, mean, centered
    survivor: str = "first"  # first, variance, all

    def validate(self) -> None:
        self.check_number("chi2_threshold", 0)
        self.check_number("cosine_threshold", -1, 1)
        self.check_whole("group", 2)
        self.check("group", self.group <= 8, "must be at most 8")  # its pairs are compared: group^4 per group
        self.check_whole("bins", 1)
        self.check("bins", self.bins <= 256, "must be at most 256")
        self.check_choice("color_space", ("rgb", "hsv"))
        self.check_choice("combine", ("and", "or", "chi2", "cosine"))
        self.check_choice("chi2_form", ("symmetric", "asymmetric"))
        self.check_choice("vector", ("pixels", "mean", "centered"))
        self.check_choice("survivor", ("first", "variance", "all"))

    def select(self, visual: VisualTokens) -> Selection:
        images = zip(visual.pixels, visual.index, strict=True)
        return Selection(torch.stack([self._keep(pixels, index, visual.grid) for pixels, index in images]))

    def _keep(self, pixels: Tensor, index: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mask [N] of one image's patches [N, 3, p, p]."""
        groups = _groups(index, grid, self.group)  # [G, m] columns, -1 where the grid ends
        if self.survivor == "variance":
            groups = _by_variance(groups, pixels)
        redundant = self._redundant(pixels[groups.clamp(min=0)])  # [G, m, m]
        survive = _all_or_nothing if self.survivor == "all" else _greedy
        there, n = survive(redundant, groups >= 0), len(index)
        keep = torch.zeros(n + 1, dtype=torch.bool, device=index.device)  # the last is where the grid ends
        return keep.scatter_(0, torch.where(groups >= 0, groups, n).flatten(), there.flatten())[:n]

    def _redundant(self, patches: Tensor) -> Tensor:
        """Which pairs of a group repeat each other, [G, m, 3, p, p] uint8 -> [G, m, m] bool."""
        flat = patches.flatten(3)  # [G, m, 3, p*p]
        colours = _hsv(flat) if self.color_space == "hsv" else flat
        close = self._chi2(_histograms(colours, self.bins)) <= self.chi2_threshold
        alike = self._cosine(colours.float()) >= self.cosine_threshold
        pairs = {"and": close & alike, "or": close | alike, "chi2": close, "cosine": alike}[self.combine]
        return pairs | ((flat[:, :, None] ^ flat[:, None]).flatten(3).amax(-1) == 0)  # identical ones, too

    def _chi2(self, h: Tensor) -> Tensor:
        """Chi-square distances of the histograms [G, m, 3 bins] -> [G, m, m]."""
        a, b = h[:, :, None], h[:, None]
        below = a + b if self.chi2_form == "symmetric" else b.expand_as(a - b)
        return torch.where(below > 0, (a - b) ** 2 / below.clamp(min=EPS), 0).sum(-1)

    def _cosine(self, colours: Tensor) -> Tensor:
        """Cosine similarities of the colour vectors [G, m, 3, p*p] -> [G, m, m]; 0 where a vector is zero."""
        mean = colours.mean(-1, keepdim=True)  # [G, m, 3, 1]
        vector = {"pixels": colours, "mean": mean, "centered": colours - mean}[self.vector].flatten(2)
        unit = normalize(vector, dim=-1, eps=EPS)
        return unit @ unit.transpose(1, 2)


def _groups(index: Tensor, grid: tuple[int, int], g: int) -> Tensor:
    """Columns of the g x g groups, raster order inside, [G, g*g]; -1 where there is no such token."""
    rows, cols = (-(-side // g) * g for side in grid)
    column = torch.full((rows * cols,), -1, device=index.device)
    column[index // grid[1] * cols + index % grid[1]] = torch.arange(len(index), device=index.device)
    return column.view(rows // g, g, cols // g, g).transpose(1, 2).reshape(-1, g * g)


def _by_variance(groups: Tensor, pixels: Tensor) -> Tensor:
    """The same groups, patches of the largest pixel variance first, missing ones last."""
    flat = pixels.long().flatten(1)
    variance = flat.shape[1] * (flat * flat).sum(-1) - flat.sum(-1) ** 2  # [N], times n^2, exact
    rank = torch.where(groups >= 0, variance[groups.clamp(min=0)], -1)
    return groups.gather(1, rank.sort(dim=1, descending=True, stable=True).indices)


def _greedy(redundant: Tensor, present: Tensor) -> Tensor:
    """Keep a patch unless a kept earlier one of its group makes it redundant, [G, m, m], [G, m] -> [G, m]."""
    keep = present.clone()
    for j in range(1, keep.shape[1]):
        keep[:, j] &= ~(redundant[:, j, :j] & keep[:, :j]).any(-1)
    return keep


def _all_or_nothing(redundant: Tensor, present: Tensor) -> Tensor:
    """Drop a patch only if it is redundant with every other one of its group; the first always stays."""
    m = present.shape[1]
    excused = ~present[:, None] | torch.eye(m, dtype=torch.bool, device=present.device)
    keep = present & ~(redundant | excused).all(-1)
    keep[:, 0] |= present[:, 0]
    return keep


def _histograms(colours: Tensor, bins: int) -> Tensor:
    """Counts per channel, [..., 3, p*p] uint8 -> [..., 3 bins] fp32."""
    counts = torch.zeros(*colours.shape[:-1], bins, device=colours.device)
    where = (colours.int() * bins >> 8).long()
    return counts.scatter_add_(-1, where, torch.ones_like(where, dtype=counts.dtype)).flatten(-2)


def _hsv(rgb: Tensor) -> Tensor:
    """Hue, saturation and value, each in 0 ... 255; [..., 3, p*p] uint8 -> same shape."""
    r, g, b = rgb.float().unbind(-2)
    high, low = rgb.float().amax(-2), rgb.float().amin(-2)
    span = (high - low).clamp(min=EPS)
    hue = torch.where(high == r, (g - b) / span % 6, torch.where(high == g, (b - r) / span + 2, (r - g) / span + 4))
    hue = torch.where(high > low, hue / 6, 0)
    saturation = torch.where(high > 0, (high - low) / high.clamp(min=EPS), 0)
    return torch.stack([hue * 255, saturation * 255, high], dim=-2).round().to(torch.uint8)
