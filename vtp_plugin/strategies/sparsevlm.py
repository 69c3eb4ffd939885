"""SparseVLM: visual tokens that the question's own raters look at stay; some of the others are recycled.

Source: arXiv 2410.04417 (ICML 2025) and the authors' code (v1.5):
1. raters, once, on the embeddings: V T^T of the visual tokens (`entry`) and the text behind the image (`text_entry`),
   softmax over the text, mean over the visual tokens: m_t; raters are the t with m_t > mean(m);
2. score at a stage: S_i = mean over raters of the attention of rater t to token i, mean over heads
   (`text_attention`, of the last layer before the cut);
3. the top k_s by S stay; k_s from fixed tables, the paper's number by matrix rank is not in the code:
   192 -> 300, 200, 110; 128 -> 303, 110, 36; 96 -> 238, 48, 26; 64 -> 66, 30, 17 of 576;
4. recycling (`recycle`): of the n pruned tokens the int(0.3 n) + 1 with the highest S are clustered into
   int(0.1 * that) + 1 clusters by DPC-kNN, and every cluster becomes its mean.
The output of layers 2, 6 and 15 of 32 is cut: the first layers without the dropped tokens are 3, 7, 16 (-> `layers`;
None scales them to the model's depth).

`version=2` (SparseVLM+, the code of December 2025): nothing is recycled, positions are the original ones, the attention
of every head (`head_attention`) is divided by the logits that all-ones queries and keys would have at these positions
(`rotary_bias`), only the 14 heads with the largest sum over raters and visual tokens count, and the tables are
192 -> 300, 200, 118; 128 -> 238, 108, 60; 96 -> 246, 54, 28; 64 -> 66, 34, 20. The divisor may be negative and then
turns a score round, as there; ours is kept away from zero by 1e-6.

`keep_ratio` (or `keep_tokens` of 576) is the paper's label: 192/576 selects the first table, values between labels are
interpolated. What is left after a stage is k_s plus the clusters: 309, 204, 113 for "192", a true average of 206.5.

DPC-kNN: distance d_ij = |x_i - x_j| / sqrt(D); density = exp(-mean of d^2 to the c nearest tokens, itself included),
c the number of clusters; separation = distance to the nearest token of higher density (the largest distance for the
densest); the c tokens with the largest density x separation are centres, and the others join the nearest centre.

Ours: ties by index instead of random noise (of two equally dense tokens the earlier counts as denser); a merged token
takes the place of its centre; the code appends merged tokens behind the kept ones. Positions are counted anew at every
stage, as there. If no text token rates above the mean, all of them are raters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vtp_plugin.selectors import density_peaks, mean_by_owner
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy, layer_numbers
from vtp_plugin.tokens import Selection, VisualTokens, best, top_k, true_columns

OF = 576
TABLES = {  # label -> tokens that stay at each stage, of 576
    0: (0, 0, 0),
    64: (66, 30, 17),
    96: (238, 48, 26),
    128: (303, 110, 36),
    192: (300, 200, 110),
    OF: (OF, OF, OF),
}
TABLES_2 = {
    0: (0, 0, 0),
    64: (66, 34, 20),
    96: (246, 54, 28),
    128: (238, 108, 60),
    192: (300, 200, 118),
    OF: (OF, OF, OF),
}
LAYERS = (3, 7, 16)  # of 32
HEADS = 14  # that count in version 2
EPS = 1e-6


@dataclass(kw_only=True)
class SparseVLM(PruningStrategy):
    """Keep the visual tokens that relevant words attend to, in three stages, and recycle some of the others."""

    name = "sparsevlm"
    stage = Stage.LLM
    cut_field = "layers"
    paper = "SparseVLM: Visual Token Sparsification for Efficient VLM Inference, https://arxiv.org/abs/2410.04417"
    merges = True
    nominal = True
    default_keep_ratio = 192 / 576

    layers: str | list[int] | None = None  # three first layers without what a stage drops
    recycle: bool | None = None  # merge some of the pruned tokens instead of dropping all; None: in version 1
    version: int = 1  # 1: the paper and v1.5; 2: SparseVLM+

    def validate(self) -> None:
        numbers = None if self.layers is None else layer_numbers(self.layers)
        self.check("layers", self.layers is None or len(numbers or ()) == 3, "must be three layers like '3 7 16'")
        self.check("recycle", self.recycle is None or isinstance(self.recycle, bool), "must be true or false")
        self.check_choice("version", (1, 2))

    @property
    def needs(self) -> tuple[str, ...]:
        read = ("text_attention",) if self.version == 1 else ("head_attention", "rotary_bias")
        return ("entry", "text_entry", *read)

    @property
    def default_positions(self) -> str:
        return "compact" if self.version == 1 else "original"

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        if self.layers is not None:
            return layer_numbers(self.layers)
        found = [0]
        for layer in LAYERS:
            found.append(max(found[-1] + 1, round(depth * layer / 32)))
        return tuple(layer for layer in found[1:] if layer < depth)

    def wanted(self, visual: VisualTokens) -> int:
        n, (stage, stages) = visual.tokens.shape[1], visual.cut
        entered = visual.entered or n
        ratio = self.keep_ratio if self.keep_tokens is None else min(1.0, self.keep_tokens / entered)
        count = interpolated(ratio * OF, stage - stages, TABLES if self.version == 1 else TABLES_2)
        return max(1, min(n, round(count * entered / OF)))

    def select(self, visual: VisualTokens) -> Selection:
        scores, k = self._scores(visual), self.wanted(visual)
        keep = top_k(scores, k)
        if not (self.version == 1 if self.recycle is None else self.recycle):
            return Selection(keep, columns=true_columns(keep, k), scores=scores)
        rows, sources, into = [], [], []
        for x, row, score in zip(visual.tokens.float(), keep, scores, strict=True):
            values, centres, joined = recycled(x, row, score, len(row) - k)
            into.append(joined)
            columns = true_columns(row.index_fill_(0, centres, True), k + len(centres))
            rows.append(x.index_copy(0, centres, values)[columns])
            sources.append(columns)
        return Selection(keep, tokens=tuple(rows), source=tuple(sources), scores=scores, into=tuple(into))

    def _scores(self, visual: VisualTokens) -> Tensor:
        """S of every token, [B, N]."""
        affinity = (visual.entry.float() @ visual.text_entry.float().transpose(1, 2)).softmax(-1).mean(1)  # [B, T]
        raters = (affinity > affinity.mean(-1, keepdim=True)).float()
        raters = torch.where(raters.any(-1, keepdim=True), raters, 1.0)
        attention = visual.text_attention if self.version == 1 else corrected(visual, raters)
        return (raters[:, :, None] * attention).sum(1) / raters.sum(-1, keepdim=True)


def corrected(visual: VisualTokens, raters: Tensor) -> Tensor:
    """Version 2: attention without the bias of positions, mean over the heads that see most, [B, T, N]."""
    bias = visual.rotary_bias
    bias = torch.where(bias < 0, bias.clamp(max=-EPS), bias.clamp(min=EPS))
    attention = visual.head_attention / bias[:, None]  # [B, H, T, N]
    seen = (raters[:, None, :, None] * attention).sum((2, 3))  # [B, H]
    heads = top_k(seen, min(HEADS, seen.shape[1])).to(attention)
    return (heads[:, :, None, None] * attention).sum(1) / heads.sum(1)[:, None, None]


def interpolated(label: float, stage: int, tables: Mapping[int, tuple[int, ...]] = TABLES) -> float:
    """The entry of a stage (negative, from the last) of the table for a label, linear between the labels."""
    labels = sorted(tables)
    high = next(known for known in labels if known >= label)
    low = max((known for known in labels if known < label), default=high)
    share = (label - low) / (high - low) if high > low else 0.0
    return tables[low][stage] + share * (tables[high][stage] - tables[low][stage])


def recycled(x: Tensor, keep: Tensor, score: Tensor, dropped: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters of the best pruned tokens, of which there are `dropped`; x [N, D], keep and score [N].

    Their means [C, D] and centres [C], and the centre that every token went to, -1 for none, [N].
    """
    pruned = true_columns(~keep, dropped)
    number = min(dropped, int(0.3 * dropped) + 1)
    candidates = pruned[best(score[pruned], number).sort().values]
    owner, centres = clusters(x[candidates], int(number / 10) + 1)
    into = torch.full_like(keep, -1, dtype=torch.long)
    into[candidates] = candidates[centres[owner]]
    return mean_by_owner(x[candidates], owner, len(centres)), candidates[centres], into


def clusters(x: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """DPC-kNN of tokens [N, D]: the cluster of every token [N], and the centres [number]."""
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    centres = best(density_peaks(distance, number), number)
    owner = distance[:, centres].argmin(-1)
    owner[centres] = torch.arange(len(centres), device=x.device)
    return owner, centres
