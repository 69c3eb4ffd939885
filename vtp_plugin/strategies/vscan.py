"""VScan, first stage: half of the tokens from windows, half from the whole picture; the others are averaged in.

Source: arXiv 2505.22654 (TMLR 2026) and the authors' code:
1. local scan: K // 2 patches by the CLS attention of block `shallow` (5), equally many in each window of `window` x
   `window` (6 x 6) patches;
2. global scan: the other patches by the CLS attention of the projected block;
3. every dropped token joins the kept one that is most similar (cosine of projected tokens); a kept token becomes the
   mean of itself and what joined it, weight 1 each (`merge=false` drops them).
Ascending order, positions renumbered. The second stage is a cut between decoder layers, at 16 of 32 in the paper, e.g.
96 -> 32: `vscan+pyramiddrop` with `pyramiddrop.layers=16`.

Ours: what does not divide by the windows goes to the windows whose next patch has the highest attention; windows at the
edge may be smaller. The mean is of the tower's features, in front of the projector: the code averages behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtp_plugin.selectors import mask
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import ComparingStrategy
from vtp_plugin.tokens import Selection, VisualTokens, best, true_columns


@dataclass(kw_only=True)
class VScan(ComparingStrategy):
    """Keep what windows and what the whole picture attend to; the others are averaged into the most similar ones."""

    name = "vscan"
    stage = Stage.PROJECTOR
    paper = "VScan: Rethinking Visual Token Reduction for Efficient LVLMs, https://arxiv.org/abs/2505.22654"
    merges = True
    default_keep_ratio = 96 / 576

    window: int = 6  # patches per side
    shallow: int = 5  # the block of the local scan
    merge: bool = True

    def validate(self) -> None:
        self.check_whole("window", 1)
        self.check("shallow", isinstance(self.shallow, int), "must be a whole number")
        self.check_choice("merge", (True, False))

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.reads("projected"), "cls_attention", "shallow_attention")

    @property
    def shallow_layer(self) -> int:
        return self.shallow

    def select(self, visual: VisualTokens) -> Selection:
        k = self.wanted(visual)
        n, local = visual.tokens.shape[1], self._local(visual, k // 2)
        rest = visual.cls_attention.float().masked_fill(mask(local, n), float("-inf"))
        kept = Selection.of(torch.cat([local, best(rest, k - k // 2)], dim=1), n, scores=visual.cls_attention)
        if not self.merge:
            return kept
        images = zip(
            visual.tokens,
            self.judged(visual, visual.projected),
            kept.columns,
            true_columns(~kept.keep, n - k),
            strict=True,
        )
        rows, into = zip(*(_averaged(*image) for image in images), strict=True)
        return replace(kept, tokens=tuple(rows), into=tuple(into))

    def _local(self, visual: VisualTokens, k: int) -> Tensor:
        """The patches that the windows give, [B, k]: every window's best, then its second ..."""
        place, columns = visual.index.clamp(min=0), visual.grid[1]
        across = -(-columns // self.window)
        window = place // columns // self.window * across + place % columns // self.window
        order = best(visual.shallow_attention, place.shape[1])  # [B, N]
        grouped = window.gather(1, order).sort(dim=1, stable=True)
        rank = torch.arange(place.shape[1], device=place.device) - torch.searchsorted(grouped.values, grouped.values)
        rank = torch.empty_like(place).scatter_(1, grouped.indices, rank)  # within the window, in the order of `order`
        return order.gather(1, rank.sort(dim=1, stable=True).indices)[:, :k]


def _averaged(x: Tensor, z: Tensor, kept: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Means of kept tokens [K] and of those that join them, [K, D], and the column that every token joined [N]."""
    into, unit = kept.new_full((len(x),), -1), normalize(z.float(), dim=-1)
    owner = (unit[gone] @ unit[kept].T).argmax(-1) if len(gone) else gone
    into[gone] = kept[owner]
    member = torch.nn.functional.one_hot(owner, len(kept)).to(torch.float32)  # [N - K, K]
    return (x[kept].float() + member.T @ x[gone].float()) / (1 + member.sum(0))[:, None], into
