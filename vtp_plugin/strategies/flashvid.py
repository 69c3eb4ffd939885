"""FlashVID: the best tokens of every frame stay; the others are merged along trees through time, then into clusters.

Source: arXiv 2602.08024 (ICLR 2026) and the authors' code, over projected tokens:
1. a segment begins where the means of neighbouring frames are less alike than `scene` (cosine 0.9); if these are fewer
   than `segments` (8), at the least alike neighbours, too;
2. every frame keeps int(`share` K / F) tokens (share 0.7) by farthest points on (1 - cos) times the attention that a
   token receives (`cls_attention`);
3. of the others, a token joins its most similar one of the frame before, inside a segment, where their cosine is
   above `join` (0.8); every tree is averaged, in the place of its first token;
4. trees become the rest of the budget by DPC-kNN (`selectors.density_peaks`, `neighbours` nearest, distances divided by
   sqrt(D)): a cluster is the mean of its trees, in the place of its centre.
Positions are the original ones. K = int(r N) is what enters the language model. The paper's budget enters 1.25 times as
large and is cut to 0.3 of that in front of decoder layer 20: `flashvid+fastv`, `fastv.layer=20`.

A still picture is a video of one frame, without trees. On towers without a class token its attention is what a patch
receives; towers of one sequence give it per window or frame.

Our reading: farthest points begin as in DivPrune; all trees of the video are clustered together; seven neighbours.
Exactly K: where there would be fewer trees than clusters, the least similar pairs stay apart. Tokens are compared as
projected (`judge=before`: by what goes into the merger); what is averaged are the projected rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot, pad

from vtp_plugin.film import Film, VideoStrategy
from vtp_plugin.selectors import density_peaks, distances, farthest_points, mask
from vtp_plugin.stages import Stage
from vtp_plugin.tokens import Selection, VisualTokens, true_columns

NEVER = -3.0  # below every cosine
FAR = 4.0  # above every 1 - cos


@dataclass(kw_only=True)
class FlashVID(VideoStrategy):
    """Keep representative tokens of every frame, and merge the others through time and by density."""

    name = "flashvid"
    stage = Stage.PROJECTOR
    paper = "FlashVID: Tree-based Spatiotemporal Token Merging, https://arxiv.org/abs/2602.08024"
    merges = True
    default_keep_ratio = 0.1

    share: float = 0.7  # of the budget, for tokens that stay as they are
    scene: float = 0.9  # cosine of the means of neighbouring frames below which a segment begins
    segments: int = 8  # at least, as far as there are frames
    join: float = 0.8  # cosine above which a token joins one of the frame before
    neighbours: int = 7  # that density is taken from

    def validate(self) -> None:
        super().validate()
        self.check_number("share", 0, 1)
        self.check_number("scene", -1, 1)
        self.check_whole("segments", 1)
        self.check_number("join", -1, 1)
        self.check_whole("neighbours", 1)

    @property
    def needs(self) -> tuple[str, ...]:
        return (*super().needs, "cls_attention")

    def select(self, visual: VisualTokens) -> Selection:
        k, n = self.wanted(visual), visual.tokens.shape[1]
        images = zip(self.images(visual), visual.tokens.float(), visual.cls_attention.float(), strict=True)
        columns, rows, into = zip(*(self._left(*where, *one, k) for where, *one in images), strict=True)
        return Selection.of(torch.stack(columns), n, tokens=rows, source=columns, into=into)

    def _left(self, judged: Tensor, film: Film, x: Tensor, attention: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one video [N, D]: the columns [k] that are left, their values, and where every token went, [N]."""
        unit, there = film.laid(normalize(judged, dim=-1)), film.there
        chosen = self._representatives(unit, film.laid(attention), there, k)
        rest, clusters = there & ~chosen, k - chosen.sum()
        parent = self._parents(unit, rest, self._begins(film.laid(judged), there), rest.sum() - clusters)
        trees = Trees.grown(parent, rest)
        root, rows = film.read(rest & (parent < 0)), film.read(trees.means(film.laid(x)))  # [N], [N, D]
        compared = rows if self.judge == "after" else film.read(trees.means(film.laid(judged)))
        centre, nearest = self._clusters(compared, root, clusters)
        columns = true_columns(film.read(chosen) | centre, k)
        member = ((nearest == columns[:, None]) & root & centre[columns, None]).to(x)  # [k, N]
        means = member @ rows / member.sum(1).clamp(min=1)[:, None]
        column_of = film.laid(torch.arange(len(x), device=x.device)).flatten()
        into = torch.where(film.read(rest), nearest[column_of[film.read(trees.root)]], -1)
        return columns, torch.where(centre[columns, None], means, x[columns]), into

    def _clusters(self, x: Tensor, root: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Which trees [N, D] are the centres of so many clusters, [N] bool, and the centre of every tree, [N]."""
        apart = distances(x[None])[0].sqrt() / x.shape[1] ** 0.5
        peaks = density_peaks(apart, self.neighbours, root)
        place = peaks.sort(descending=True, stable=True).indices.argsort()
        centre = root & (place < number)
        nearest = apart.masked_fill(~centre, float("inf")).argmin(-1)
        return centre, torch.where(centre, torch.arange(len(x), device=x.device), nearest)

    def _begins(self, table: Tensor, there: Tensor) -> Tensor:
        """Which frames begin a segment, [F] bool; tokens [F, P, D]."""
        means = normalize(table.sum(1) / there.sum(1).clamp(min=1)[:, None], dim=-1)
        alike = (means[1:] * means[:-1]).sum(-1)
        place = alike.sort(stable=True).indices.argsort()
        return pad((alike < self.scene) | (place < self.segments - 1), (1, 0), value=True)

    def _representatives(self, unit: Tensor, attention: Tensor, there: Tensor, k: int) -> Tensor:
        """The tokens of every frame that stay as they are, [F, P] bool; unit [F, P, D], attention [F, P]."""
        frames, places = there.shape
        if not (each := int(self.share * k / frames + 1e-9)):
            return torch.zeros_like(there)
        apart = 1 - unit @ unit.mT
        apart = apart.masked_fill(~(there[:, None] & there[:, :, None]), FAR)
        picks = farthest_points(apart, min(each, places), attention.masked_fill(~there, -1))
        return mask(picks, places) & there

    def _parents(self, unit: Tensor, rest: Tensor, begins: Tensor, most: Tensor) -> Tensor:
        """The place in the frame before that every token joins, -1 for none, [F, P]; at most so many join."""
        alike = (unit[1:] @ unit[:-1].mT).masked_fill(~rest[:-1, None], NEVER)  # [F - 1, P, P]
        parent = alike.argmax(-1)
        value = alike.gather(-1, parent[..., None])[..., 0]
        value = value.masked_fill(~(rest[1:] & (value > self.join) & ~begins[1:, None]), NEVER)
        place = value.flatten().sort(descending=True, stable=True).indices.argsort().view_as(value)
        joins = (value > NEVER) & (place < most)
        return pad(parent.masked_fill(~joins, -1), (0, 0, 1, 0), value=-1)


@dataclass(frozen=True)
class Trees:
    """Tokens by frame and place [F, P] of which each may have a parent in the frame before."""

    links: tuple[Tensor, ...]  # of 1, 2, 4 ... frames: [F - step, child, ancestor] that many frames before, 0 or 1
    root: Tensor  # [F, P] long: frame * P + place of the root
    rest: Tensor  # [F, P] bool: which tokens take part

    @classmethod
    def grown(cls, parent: Tensor, rest: Tensor) -> Trees:
        """From the place of every parent, -1 for none, [F, P]."""
        frames, places = parent.shape
        root = torch.arange(frames * places, device=parent.device).view_as(parent)
        root = torch.where(parent < 0, root, root - root % places - places + parent)
        links, ancestor, step = [], parent, 1
        while step < frames:
            late = ancestor[step:]
            links.append((one_hot(late.clamp(min=0), places) * (late >= 0)[..., None]).float())
            further = ancestor[:-step].gather(1, late.clamp(min=0)).masked_fill(late < 0, -1)
            ancestor = pad(further, (0, 0, step, 0), value=-1)
            root, step = root.flatten()[root], 2 * step
        return cls(tuple(links), root, rest)

    def means(self, table: Tensor) -> Tensor:
        """Of every tree of tokens [F, P, D], in the place of its root; elsewhere of what hangs on a token."""
        ones = self.rest[..., None].to(table)
        sums = torch.cat([table * ones, ones], dim=-1)
        for number, link in enumerate(self.links):
            step = 2**number
            sums = sums + pad(link.mT @ sums[step:], (0, 0, 0, 0, 0, step))
        return sums[..., :-1] / sums[..., -1:].clamp(min=1)
