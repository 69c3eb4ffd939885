"""HoloV: every stretch of the picture gets a share of the tokens; attention does not spend them all in one place.

Source: arXiv 2510.02912 (NeurIPS 2025) and the authors' code, over projected tokens z and the CLS attention a of the
projected block (mean over heads):
1. the raster is cut into `segments` (16) pieces of equal length, stretches of rows (the paper speaks of crops);
2. in a piece, v_i is the variance of the cosines of z_i with the others; the score of a token is 1000 a_i + `context`
   (0.09) v_i mean|1000 a| / mean|v|, means over the image; that of a piece is the mean of its tokens;
3. a piece gets floor(K share of its score) tokens, what is left goes one by one to the best pieces;
4. in a piece the tokens with the highest attention stay, in the order of their attention (`order=raster` sorts them).
Positions are renumbered.

Ours: a piece that is shorter than its part gives the rest to the next best ones (the code fills up with zero vectors),
so exactly K stay; K and the number of pieces are not fixed; pieces differ in length by one where N does not divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vtp_plugin.selectors import apportioned, cosines
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import ComparingStrategy
from vtp_plugin.tokens import Selection, VisualTokens, best, true_columns

SCALE = 1000.0


@dataclass(kw_only=True)
class HoloV(ComparingStrategy):
    """Divide the budget among stretches of the picture, and spend it there by CLS attention."""

    name = "holov"
    stage = Stage.PROJECTOR
    paper = "HoloV: Holistic Vision Token Pruning, https://arxiv.org/abs/2510.02912"
    default_keep_ratio = 64 / 576

    segments: int = 16
    context: float = 0.09  # weight of the variance
    order: str = "score"  # of the kept tokens: score, within their stretches, or raster

    def validate(self) -> None:
        self.check_whole("segments", 1)
        self.check_number("context", 0)
        self.check_choice("order", ("score", "raster"))

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.reads("projected"), "cls_attention")

    def select(self, visual: VisualTokens) -> Selection:
        k = self.wanted(visual)
        z, n = self.judged(visual, visual.projected), visual.tokens.shape[1]
        pieces = torch.arange(n, device=visual.index.device).tensor_split(min(self.segments, n))
        images = zip(z, visual.cls_attention, strict=True)
        worth = torch.stack([self._worth(*image, pieces) for image in images])  # [B, S]
        stretch = torch.cat([torch.full_like(piece, number) for number, piece in enumerate(pieces)])
        sources = _spent(visual.cls_attention, stretch, _quotas(worth, stretch, k), k)
        kept = Selection.of(sources, n, scores=visual.cls_attention, finite=worth.isfinite().all())
        return kept if self.order == "raster" else replace(kept, source=sources.unbind())

    def _worth(self, z: Tensor, attention: Tensor, pieces: Sequence[Tensor]) -> Tensor:
        """The scores of the stretches of one image, [S]."""
        variance = torch.cat([_variance(z[piece]) for piece in pieces])
        salient = SCALE * attention.float()
        scores = salient + self.context * variance * salient.abs().mean() / variance.abs().mean().clamp(min=1e-12)
        return torch.stack([scores[piece].mean() for piece in pieces])


def _spent(attention: Tensor, stretch: Tensor, quotas: Tensor, k: int) -> Tensor:
    """The columns that stay, stretch by stretch [B, k], of tokens in a `stretch` [N] each, with quotas [B, S]."""
    order = best(attention, len(stretch))
    order = order.gather(1, stretch[order].sort(dim=1, stable=True).indices)  # [B, N]
    place = torch.arange(len(stretch), device=stretch.device) - torch.searchsorted(stretch, stretch)
    return order.gather(1, true_columns(place < quotas[:, stretch], k))


def _variance(z: Tensor) -> Tensor:
    """Of the cosines of every token [n, D] with the others, [n]; 0 for one alone."""
    alike, others = cosines(z[None])[0], max(1, len(z) - 1)
    alone = torch.eye(len(z), dtype=torch.bool, device=z.device)
    mean = alike.masked_fill(alone, 0).sum(-1, keepdim=True) / others
    return ((alike - mean) ** 2).masked_fill(alone, 0).sum(-1) / others


def _quotas(worth: Tensor, stretch: Tensor, k: int) -> Tensor:
    """k tokens divided in proportion to the worth of stretches [B, S], as far as they have room; the rest to the best.

    The rest goes round: one token to each stretch with room, the best first, until nothing is left; [B, S] long.
    """
    worth, room = worth.double(), one_hot(stretch, worth.shape[1]).sum(0)
    total = worth.sum(1, keepdim=True)
    shares = torch.where(total > 0, worth / total, 1 / worth.shape[1])
    return apportioned(k * shares, room, k, first=worth)
