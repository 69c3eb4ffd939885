"""ToMe: alike tokens are merged, a few in every block of the vision tower.

Source: arXiv 2210.09461 (ICLR 2023). Between attention and MLP of a block, on its n tokens:
1. every second token, the class token first, is in A, the others are in B;
2. s_a = max over b of cos(k_a, k_b), k the keys of this block, mean over heads (`keys`);
3. the r tokens of A with the largest s_a become part of their best b, by the mean weighted with the number of patches
   that each stands for (`sizes`). The class token never does. What is left of A is followed by B;
4. from then on log(size) is added to the logits of a key (`proportional`).
r <= n / 2, rounded down; the same r in every block (`inflection` = 0), or linear in the block from 0 to twice r (+1) or
from twice r to 0 (-1).

Letters: the paper's r is (N - K) / blocks, K = `keep_tokens` or int(keep_ratio N): 16 -> 192 of 576 over 24 blocks.
Only the blocks whose output is projected count: 23 of CLIP's 24 in LLaVA-1.5.

Ours: r need not be whole: after block l of L, N - (N - K) (share of the schedule up to l), rounded, are left, and K
is met exactly; where half of the tokens is less than asked, the next blocks catch up. Behind the last merge the tokens
are put in the order of their first patch, because a language model reads them in raster order. Ties by lower index.
What is left of A is sorted in every tower; the code does so only where there is a class token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens


@dataclass(kw_only=True)
class ToMe(PruningStrategy):
    """Merge the most similar tokens inside every block of the vision tower."""

    name = "tome"
    stage = Stage.VIT
    paper = "ToMe: Token Merging: Your ViT But Faster, https://arxiv.org/abs/2210.09461"
    needs = ("keys", "sizes", "cls")
    merges = True
    default_keep_ratio = 1 / 3

    inflection: float = 0.0  # -1 merges most in the first blocks, 1 in the last
    proportional: bool = True  # a key counts as often as patches were merged into it

    def validate(self) -> None:
        self.check_number("inflection", -1, 1)
        self.check_choice("proportional", (True, False))

    def cut_blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def wanted(self, visual: VisualTokens) -> int:
        n, (step, steps) = visual.tokens.shape[1], visual.cut
        entered = visual.entered or n
        last = self.count(entered)
        left = min(self._scheduled(entered, last, step, steps), last * 2 ** (steps - 1 - step))
        return min(n, max(left, n - n // 2))

    def _scheduled(self, entered: int, last: int, step: int, steps: int) -> int:
        """Tokens left behind a step if nothing stood in the way."""
        done = step + 1
        tilt = self.inflection * done * (done - steps) / max(1, steps - 1)  # sum of i * (2 j / (steps - 1) - 1)
        return entered - round((entered - last) * (done + tilt) / steps)

    def decide(self, visual: VisualTokens) -> Selection:
        (step, steps), n = visual.cut, visual.tokens.shape[1]
        entered = visual.entered or n
        if step + 1 == steps and self.wanted(visual) > self.count(entered):
            raise self.error(
                f"{steps} blocks cannot merge {entered} tokens into {self.count(entered)}, each halves them at most"
            )
        if n < entered and step + 1 == steps:  # also where this block merges nothing: the order is restored
            with torch.no_grad():
                return self.select(visual)
        return super().decide(visual)

    def select(self, visual: VisualTokens) -> Selection:
        k, first = self.wanted(visual), int(visual.cls is not None)
        rows = [_matched(keys, k, first) for keys in visual.keys]
        ordered = visual.cut[0] + 1 == visual.cut[1]
        pairs = [_led(owner, index, k, ordered) for owner, index in zip(rows, visual.index, strict=True)]
        owner, source = torch.stack([o for o, _ in pairs]), torch.stack([s for _, s in pairs])
        keep = torch.zeros_like(visual.index, dtype=torch.bool).scatter_(1, source, True)
        selection = Selection(keep, source=tuple(source), owner=owner)
        return replace(selection, tokens=tuple(selection.merged(visual.tokens, visual.sizes)))


def _matched(keys: Tensor, k: int, first: int) -> Tensor:
    """The new token, of k, that every token [N] becomes part of; keys [N, d] behind `first` class tokens."""
    columns = torch.arange(len(keys), device=keys.device)
    a, b = columns[first::2], columns[1 - first :: 2]
    owner, r = torch.empty_like(columns), len(keys) - k
    if r == 0:
        owner[torch.cat([a, b])] = columns
        return owner
    unit = normalize(keys.float(), dim=-1)
    alike, best = (unit[a] @ unit[b].T).max(-1)
    ranked = alike.sort(descending=True, stable=True).indices
    merged, left = ranked[:r], ranked[r:].sort().values
    owner[torch.cat([a[left], b])] = columns[:k]
    owner[a[merged]] = owner[b[best[merged]]]
    return owner


def _led(owner: Tensor, index: Tensor, k: int, ordered: bool) -> tuple[Tensor, Tensor]:
    """Owners [N], and per new token [k] the column of its first patch; sorted by that patch if asked."""
    raster = index.sort(stable=True).indices
    rank = torch.empty_like(raster)
    rank[raster] = torch.arange(len(raster), device=raster.device)
    lead = rank.new_full((k,), len(rank)).scatter_reduce_(0, owner, rank, "amin")
    if ordered:
        order = lead.argsort()
        place = torch.empty_like(order)
        place[order] = torch.arange(k, device=order.device)
        owner, lead = place[owner], lead[order]
    return owner, raster[lead]
