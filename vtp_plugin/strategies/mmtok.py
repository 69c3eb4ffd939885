"""MMTok: tokens that cover both the words of the question and the picture itself.

Source: arXiv 2508.18264 (ICLR 2026) and the authors' code. With rows over the N visual tokens j:
1. P = softmax_j(cos(word t, z_j) / tau_t) / T, for the T words of the question: their input embeddings of the language
   model (`words`) against projected tokens z (`projected`); tau_t -> `text_temperature` (0.02);
2. Q = softmax_j(cos(x_i, x_j) / tau_v) alpha / N, for the N tower features x_i; tau_v -> `image_temperature` (0.2),
   alpha -> `alpha` (0.5);
3. R = [P; Q]; K times the j of the largest sum over rows of max(0, R_j - covered), covered <- max(covered, R_j), from 0
   on. Ascending order, positions renumbered.

Our reading: the words are the question's without the chat template. A prompt without a question is covered by Q alone.
K = int(r N). alpha = 0 covers the words only, and goes on by lower index once they are covered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtp_plugin.replay import replayed
from vtp_plugin.selectors import cosines, greedy
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import ComparingStrategy
from vtp_plugin.tokens import Selection, VisualTokens


@dataclass(kw_only=True)
class MMTok(ComparingStrategy):
    """Keep tokens that cover the words of the question and the other tokens."""

    name = "mmtok"
    stage = Stage.PROJECTOR
    paper = "MMTok: Multimodal Coverage Maximization for Visual Token Selection, https://arxiv.org/abs/2508.18264"
    text_encoder = "llm"
    default_keep_ratio = 64 / 576

    alpha: float = 0.5  # weight of the picture's own rows
    text_temperature: float = 0.02
    image_temperature: float = 0.2

    def validate(self) -> None:
        self.check_number("alpha", 0)
        for field in ("text_temperature", "image_temperature"):
            self.check_number(field, 1e-4)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("projected", "words", *self.reads())

    def select(self, visual: VisualTokens) -> Selection:
        k, n = self.wanted(visual), visual.tokens.shape[1]
        images = zip(self.judged(visual, visual.tokens), visual.projected, visual.words, strict=True)
        return Selection.of(_covering(torch.stack([self._rows(*image) for image in images]), k), n)

    def _rows(self, x: Tensor, z: Tensor, words: Tensor) -> Tensor:
        """What is to be covered of one image, [T + N, N]; zero for what only fills up the words [T, L] of a batch."""
        image = cosines(x[None])[0].div_(self.image_temperature).softmax(-1).mul_(self.alpha / len(x))
        real = words.any(-1, keepdim=True)
        alike = normalize(words.float(), dim=-1) @ normalize(z.float(), dim=-1).T  # [T, N]
        text = (alike / self.text_temperature).softmax(-1) * real / real.sum().clamp(min=1)
        return torch.cat([text, image])


@replayed
def _covering(rows: Tensor, k: int) -> Tensor:
    """k columns of [B, R, N] whose maximum over columns has the largest sum, greedily, [B, k]."""
    covered, more = rows.new_zeros(*rows.shape[:2], 1), torch.empty_like(rows)

    def pick(best: Tensor) -> None:
        torch.maximum(covered, rows.gather(2, best[:, None, None].expand_as(covered)), out=covered)

    def gain() -> Tensor:
        return torch.sub(rows, covered, out=more).clamp_(min=0).sum(1)

    return greedy(gain, pick, torch.zeros_like(rows[:, 0], dtype=torch.bool), k)
