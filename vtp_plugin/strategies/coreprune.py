"""CoRePrune, second stage: what leaves must not move the answers that the question's tokens get from attention.

Source: the paper; between decoder layers, behind layer 7 (0-based) of 32, that is `layer` = 8; None is a quarter of any
model's depth. Receivers are the text tokens behind the image. Per head, a receiver's output is Y = sum_j a_j V_j.
Without the tokens of a set S, and with attention summing to one again, it moves by
|sum_S a_i (V_i - Y)| / (1 - sum_S a_i); D(S) is the mean over heads and receivers.
1. S begins with all visual tokens of the image;
2. the `step` (4) tokens with the largest D(S) - D(S without i) are rescued, both sums follow, until K are back.
The budget K here counts what is left behind the cut; the paper's number that enters the language model is larger (its
first stage, inside the tower, is not part of this).

Our reading: sums over all heads of the language model, in double precision; 1 - sum_S a_i is at least 1e-9, where a
receiver sees nothing else; the last round rescues what is missing to K. Positions are original.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens

LEFT = 1e-9


@dataclass(kw_only=True)
class CoRePrune(PruningStrategy):
    """Rescue the tokens whose loss would move the question's attention outputs most."""

    name = "coreprune"
    stage = Stage.LLM
    paper = "CoRePrune: Contribution-aware Rescue for Visual Token Pruning, second stage"
    needs = ("head_attention", "values", "outputs")
    default_keep_ratio = 64 / 256

    layer: int | None = None  # the first decoder layer that does not see the dropped tokens; None: at a quarter
    step: int = 4  # tokens that are rescued at a time

    def validate(self) -> None:
        if self.layer is not None:
            self.check_whole("layer", 1)
        self.check_whole("step", 1)

    @property
    def decoder_layer(self) -> int | None:
        return self.layer

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        return (max(1, depth // 4) if self.layer is None else self.layer,)

    def select(self, visual: VisualTokens) -> Selection:
        k = self.wanted(visual)
        images = zip(visual.head_attention, visual.values, visual.outputs, strict=True)
        picks = torch.stack([self._rescued(*image, k) for image in images])
        return Selection.of(picks, visual.tokens.shape[1])

    def _rescued(self, attention: Tensor, values: Tensor, outputs: Tensor, k: int) -> Tensor:
        """The k tokens that stay of one image; attention [H, T, N], values [H, N, d], outputs [H, T, d]."""
        a, v, y = attention.double(), values.double(), outputs.double()
        size = _along(y, v).mul_(-2).add_(torch.einsum("hnd,hnd->hn", v, v)[:, None]).add_(_squared(y)).mul_(a**2)
        keep = torch.zeros(a.shape[-1], dtype=torch.bool, device=a.device)
        picks: list[Tensor] = []
        for missing in range(k, 0, -self.step):
            left = _without_each(a, v, y, size, keep).masked_fill(keep, float("inf"))  # the smallest is the best
            best = left.sort(stable=True).indices[: min(self.step, missing)]
            keep.index_fill_(0, best, True)
            picks.append(best)
        return torch.cat(picks)


def _without_each(a: Tensor, v: Tensor, y: Tensor, size: Tensor, keep: Tensor) -> Tensor:
    """D(S without i) of every token i [N], where S is what is not kept; size [H, T, N] is |a_i (V_i - Y)|^2.

    In place, because a map of all heads in double precision is larger than what a layer works on.
    """
    lost = a * ~keep
    total = lost.sum(-1)[..., None]  # [H, T, 1]
    moved = torch.einsum("htn,hnd->htd", lost, v) - total * y  # sum_S a_i (V_i - Y)
    cross = _along(moved, v).sub_((moved * y).sum(-1, keepdim=True)).mul_(a)  # <moved, a_i (V_i - Y)>
    length = cross.mul_(-2).add_(_squared(moved)).add_(size).clamp_(min=0).sqrt_()
    rest = torch.sub(a, total, out=lost).add_(1).clamp_(min=LEFT)
    return length.div_(rest).mean((0, 1))


def _along(queries: Tensor, values: Tensor) -> Tensor:
    """<V_i, q> of queries [H, T, d] and values [H, N, d], [H, T, N]."""
    return torch.einsum("htd,hnd->htn", queries, values)


def _squared(vectors: Tensor) -> Tensor:
    """|v|^2, [..., 1]."""
    return vectors.square().sum(-1, keepdim=True)
