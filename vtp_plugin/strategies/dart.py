"""DART: tokens that repeat a few pivots leave; attention is not asked.

Source: arXiv 2502.11494 (EMNLP 2025) and the authors' code, inside the language model before layer 2 (-> `layer`):
1. pivots: the `image_pivots` (4) visual and the `text_pivots` (4) text tokens whose keys in the layer before the cut,
   rotated, all heads side by side, have the largest L1 norm (`key_norms`, `text_key_norms`);
2. each pivot in turn keeps the q remaining visual tokens that are least similar to it: cosine of the hidden states
   after the language model's final norm (`normed`, `text_normed`);
3. survivors in ascending order, with their original positions.

Ours: the order of the pivots is image pivots, then text pivots, each by falling norm (the code's is that of a hash set,
which moves 1-4 tokens); text pivots come from the text behind the image; and exactly K tokens stay: the image pivots
count, and the first (K - pivots) mod 8 pivots keep one token more. `pivots_extra=true` counts as the code: q = K // 8,
so K = 128 keeps 4 + 8 * 16 = 132.
`at=projector` is our pre-LLM form: pivots and similarities of the projected tokens, no text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtp_plugin.strategy import ComparingStrategy, PlacedStrategy
from vtp_plugin.tokens import Selection, VisualTokens


@dataclass(kw_only=True)
class DART(PlacedStrategy, ComparingStrategy):
    """Keep a few pivots and the visual tokens that resemble them least."""

    name = "dart"
    paper = "Stop Looking for Important Tokens: DART, https://arxiv.org/abs/2502.11494"
    default_keep_ratio = 128 / 576

    places = ("llm", "projector")

    at: str = "llm"  # the stage
    image_pivots: int = 4
    text_pivots: int = 4  # for at=llm
    pivots_extra: bool = False  # count the pivots beside the budget, as the code does

    def validate(self) -> None:
        super().validate()
        self.check_whole("image_pivots", 1)
        self.check_whole("text_pivots", 0)
        self.check_choice("pivots_extra", (True, False))

    @property
    def needs(self) -> tuple[str, ...]:
        if self.at == "llm":
            return ("key_norms", "text_key_norms", "normed", "text_normed")
        return self.reads("projected")

    def select(self, visual: VisualTokens) -> Selection:
        k, n = self.wanted(visual), visual.tokens.shape[1]
        return Selection.of(torch.stack([self._kept(*image, k) for image in self._images(visual)]), n)

    def _images(self, visual: VisualTokens) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Per image: norms [N] and tokens [N, D] to judge by, and the same of the text."""
        if self.at == "llm":
            return list(zip(visual.key_norms, visual.normed, visual.text_key_norms, visual.text_normed, strict=True))
        z = self.judged(visual, visual.projected).float()
        return [(one.abs().sum(-1), one, one.new_zeros(0), one[:0]) for one in z]

    def _kept(self, norms: Tensor, tokens: Tensor, text_norms: Tensor, text: Tensor, k: int) -> Tensor:
        """The columns that stay of one image."""
        own, words = _largest(norms, self.image_pivots), _largest(text_norms, self.text_pivots)
        unit = normalize(tokens.float(), dim=-1)
        pivots = torch.cat([unit[own], normalize(text.float(), dim=-1)[words]])
        similarity = pivots @ unit.T  # [P, N]
        quotas = self._quotas(k, len(own), len(pivots))
        left = torch.ones_like(norms, dtype=torch.bool)
        kept = [own if self.pivots_extra else own[:k]]
        left.index_fill_(0, kept[0], False)
        number = len(norms) - len(kept[0])
        for row, quota in zip(similarity, quotas, strict=True):
            candidates = row.masked_fill(~left, float("inf"))
            kept.append(candidates.sort(stable=True).indices[: min(quota, number)])
            left.index_fill_(0, kept[-1], False)
            number -= len(kept[-1])
        return torch.cat(kept)

    def _quotas(self, k: int, own: int, pivots: int) -> list[int]:
        """How many tokens each pivot keeps."""
        if self.pivots_extra:
            return [k // pivots] * pivots
        each, more = divmod(max(0, k - own), pivots)
        return [each + (place < more) for place in range(pivots)]


def _largest(norms: Tensor, number: int) -> Tensor:
    return norms.sort(descending=True, stable=True).indices[:number]
