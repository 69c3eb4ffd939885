"""PruMerge: patches whose CLS attention is an outlier stay, and take up the patches whose keys resemble theirs.

Source: arXiv 2403.15388 (ICCV 2025) and the authors' code, where the two differ:
1. a_j = softmax_j(q_CLS k_j / sqrt(d)) over the class token and the patches, with query and keys of the LAST block, all
   heads side by side as one (not the 16-head attention of the model): `class_query`, `class_key`, `raw_keys`. The class
   token's own share is dropped afterwards, so the a_j of the patches sum to 1 - a_CLS;
2. without a budget the number follows from the image: the share rho of a_i > Q3 + 1.5 (Q3 - Q1), K = int(rho N); the
   top K by a, in the order of their scores;
3. every kept i: x_i + sum of a_j x_j over its `neighbours` (32) nearest patches by key cosine, kept ones too;
4. one more token: the sum of a_j x_j over the patches that were dropped.
PruMerge+ adds, to 2, the patches at every step-th index, step = int(int(1 / rho) / 3), that are not kept yet.
The released weights were fine-tuned for it; training-free is a use that others have measured.

Our reading: the share is taken per image, not over the batch. No outlier at all leaves the merged token alone (base;
the code of the plus version divides by zero); a step is at least 1. Where all N patches would stay, the
last one chosen makes room for the merged token. With a budget of K tokens the extra token is one of them, and the plus
version spends a quarter of the other K - 1 on scores and the rest on evenly spaced indices among those not kept, which
is the adaptive version's own proportion (rho N by scores, 3 rho N by stride).
`order=raster` sorts the kept tokens by position, which the language model has no other way to learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtp_plugin.selectors import cosines
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens, true_columns


@dataclass(kw_only=True)
class PruMerge(PruningStrategy):
    """Keep outliers of CLS attention and merge the others into them; without a budget the image decides how many."""

    name = "prumerge"
    stage = Stage.PROJECTOR
    paper = "LLaVA-PruMerge: Adaptive Token Reduction, https://arxiv.org/abs/2403.15388"
    needs = ("class_query", "class_key", "raw_keys")
    merges = True

    neighbours: int = 32  # patches that a kept one takes up
    order: str = "score"  # score or raster

    def __post_init__(self) -> None:
        self.budgeted = self.keep_ratio is not None or self.keep_tokens is not None
        super().__post_init__()

    def validate(self) -> None:
        self.check_whole("neighbours", 0)
        self.check_choice("order", ("score", "raster"))

    @property
    def tower_layer(self) -> int:
        return -1

    def select(self, visual: VisualTokens) -> Selection:
        if visual.class_query is None:
            raise self.error("needs a vision tower with a class token")
        keys = torch.cat([visual.class_key[:, None], visual.raw_keys], dim=1)  # [B, 1 + N, d']
        logits = torch.einsum("bd,bnd->bn", visual.class_query, keys)
        attention = (logits * keys.shape[-1] ** -0.5).softmax(-1)[:, 1:]
        rows, sources = zip(
            *(self._merged(*image) for image in zip(visual.tokens, attention, cosines(visual.raw_keys), strict=True)),
            strict=True,
        )
        keep = torch.zeros_like(visual.index, dtype=torch.bool)
        for row, source in zip(keep, sources, strict=True):
            row.index_fill_(0, source[:-1], True)
        return Selection(keep, tokens=tuple(rows), source=tuple(sources), scores=attention)

    def chosen(self, attention: Tensor) -> Tensor:
        """The kept columns of one image [N], the best first."""
        n = len(attention)
        return _ranked(attention)[: self.count(n) - 1 if self.budgeted else int(outliers(attention) * n + 1e-9)]

    def _merged(self, x: Tensor, attention: Tensor, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens and their columns, -1 for the last, of one image [N, D], [N], [N, N]."""
        kept = self.chosen(attention)[: len(x) - 1]
        kept = kept.sort().values if self.order == "raster" else kept
        dropped = attention.index_fill(0, kept, 0)
        weighted = attention[:, None] * x.float()
        near = similarity[kept].scatter(1, kept[:, None], float("-inf"))  # not itself
        near = near.sort(dim=1, descending=True, stable=True).indices[:, : min(self.neighbours, len(x) - 1)]
        rows = torch.cat([x.float()[kept] + weighted[near].sum(1), (dropped[:, None] * x.float()).sum(0)[None]])
        return rows, torch.cat([kept, kept.new_full((1,), -1)])


@dataclass(kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge with evenly spaced patches added."""

    name = "prumerge_plus"

    def chosen(self, attention: Tensor) -> Tensor:
        n, ranked = len(attention), _ranked(attention)
        if self.budgeted:
            k = self.count(n) - 1
            first = ranked[: round(k / 4)]
            left = torch.ones_like(ranked, dtype=torch.bool).index_fill_(0, first, False)
            others = true_columns(left, n - len(first))
            wanted = k - len(first)
            return torch.cat([first, others[torch.arange(wanted, device=first.device) * len(others) // max(1, wanted)]])
        share = outliers(attention)
        if share == 0:
            return ranked[:0]
        first = ranked[: int(share * n + 1e-9)]
        step = max(1, int(int(1 / share) / 3))
        return torch.cat([first, _without(torch.arange(0, n - 1, step, device=first.device), first)])


def outliers(attention: Tensor) -> float:
    """The share of scores [N] above Q3 + 1.5 (Q3 - Q1)."""
    low, high = torch.quantile(attention, torch.arange(1, 4, 2, device=attention.device) / 4).double()
    return (attention > high + 1.5 * (high - low)).float().mean().item()


def _ranked(attention: Tensor) -> Tensor:
    return attention.sort(descending=True, stable=True).indices


def _without(columns: Tensor, taken: Tensor) -> Tensor:
    return columns[~torch.isin(columns, taken)]
