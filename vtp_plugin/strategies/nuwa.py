"""Nuwa: the best patches of every region, the plainer ones smoothed; positions keep the geometry.

Source: arXiv 2602.02951 (ICLR 2026), from notes on it. First stage, in front of the language model:
1. the grid is cut into `regions` x `regions`; salience = CLS attention x norm of the key; every region keeps its most
   salient patches, K / regions^2 each;
2. kept patches in the upper quartile of key norms (of all patches) stay as they are. Every other becomes the mean of
   the patches around it, nearer than `radius` (0.26) of the largest distance in the grid, itself included, weighted
   with the cosine of their values, negative ones 0 (`smooth=false` leaves them).
Second stage, `at=llm`: the tokens whose hidden state in front of decoder layer `layer` is most similar to the mean
state of the text behind the image (cosine) stay; both after the language model's final norm.

Our reading: keys and values of the projected block, keys as the mean over heads. What does not divide by the regions
goes to those whose next patch is most salient. The paper stretches the positions of the kept tokens over the range that
there was; ours keeps every token's own position, which is within a region of that. Both stages: name the second
one's settings in a run of its own, or compose with another method of the llm stage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, one_hot

from vtp_plugin.strategy import PlacedStrategy
from vtp_plugin.tokens import Selection, VisualTokens, best


@dataclass(kw_only=True)
class Nuwa(PlacedStrategy):
    """Keep the most salient patches of every region, and smooth those that do not stand out."""

    name = "nuwa"
    paper = "Nuwa: Mending the Spatial Integrity Torn by VLM Token Pruning, https://arxiv.org/abs/2602.02951"
    merges = True
    default_keep_ratio = 64 / 576
    default_positions = "original"

    places = ("projector", "llm")

    layer: int = 16  # for at=llm
    regions: int = 4  # per side
    radius: float = 0.26  # of the largest distance in the grid
    smooth: bool = True

    def validate(self) -> None:
        super().validate()
        self.check_whole("regions", 1)
        self.check_number("radius", 0, 1)
        self.check_choice("smooth", (True, False))

    @property
    def needs(self) -> tuple[str, ...]:
        if self.at == "llm":
            return ("normed", "text_normed")
        return ("cls_attention", "keys") + ("patch_values",) * self.smooth

    def select(self, visual: VisualTokens) -> Selection:
        if self.at == "llm":
            text = normalize(visual.text_normed.float().mean(1, keepdim=True), dim=-1)
            scores = cosine_similarity(visual.normed.float(), text, dim=-1)
            return Selection.of(best(scores, self.wanted(visual)), scores.shape[1], scores=scores)
        norms = visual.keys.float().norm(dim=-1)  # [B, N]
        salience = visual.cls_attention.float() * norms
        kept = Selection.of(self._kept(visual, salience), norms.shape[1], scores=salience)
        if not self.smooth:
            return kept
        rows = [self._smoothed(visual, b, norms[b], kept.columns[b]) for b in range(len(norms))]
        return replace(kept, tokens=tuple(rows))

    def _kept(self, visual: VisualTokens, salience: Tensor) -> Tensor:
        """The best patches of every region, every region's best before its second, [B, K]."""
        place = visual.index.clamp(min=0)
        down, across = place // visual.grid[1], place % visual.grid[1]
        region = down * self.regions // visual.grid[0] * self.regions + across * self.regions // visual.grid[1]
        order = salience.sort(dim=-1, descending=True, stable=True).indices  # [B, N]
        member = one_hot(region.gather(1, order), self.regions**2)  # [B, N, R]
        rank = (member.cumsum(1) * member).sum(-1)  # [B, N]: within its region, from 1 on
        return order.gather(1, rank.sort(dim=-1, stable=True).indices)[:, : self.wanted(visual)]

    def _smoothed(self, visual: VisualTokens, b: int, norms: Tensor, kept: Tensor) -> Tensor:
        """New values of the kept patches [K] of one image, [K, D] fp32."""
        x, place = visual.tokens[b].float(), visual.index[b].clamp(min=0)
        where = torch.stack([place // visual.grid[1], place % visual.grid[1]], dim=-1).float()
        values = normalize(visual.patch_values[b].float(), dim=-1)
        largest = ((visual.grid[0] - 1) ** 2 + (visual.grid[1] - 1) ** 2) ** 0.5
        near = torch.cdist(where[kept], where) < self.radius * largest  # [K, N]
        near |= torch.arange(len(x), device=x.device) == kept[:, None]
        weight = (values[kept] @ values.T).clamp(min=0) * near
        total = weight.sum(-1, keepdim=True)
        mean = torch.where(total > 0, weight @ x / total.clamp(min=1e-12), x[kept])
        stands_out = norms[kept] >= torch.quantile(norms, 0.75)
        return torch.where(stands_out[:, None], x[kept], mean)
