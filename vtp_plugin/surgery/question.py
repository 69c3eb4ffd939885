"""The question in a prompt, without the chat template around it, and in the language model's own space."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtp_plugin.errors import PruningError
from vtp_plugin.facts.conversation import framed, question_of
from vtp_plugin.facts.family import Family

__all__ = ["CallQuestions", "EmbeddedQuestions", "framed", "question_of"]


class EmbeddedQuestions:
    """The input space of a language model: what stands in for CLIP's shared space (text_encoder=llm)."""

    segments = False  # no question is too long for it

    def __init__(self, adapter: Family) -> None:
        if not adapter.projectors:  # its language model holds no patches
            raise PruningError(
                f"text_encoder=llm: the language model of {adapter.models} does not see the projected patches"
            )
        self.adapter = adapter

    def text(self, questions: Sequence[str]) -> Tensor:
        """Mean input embedding of every question's tokens, [B, E] fp32."""
        return torch.stack([tokens.mean(0) for tokens in self.words(questions)])

    def words(self, questions: Sequence[str]) -> Sequence[Tensor]:
        """Input embeddings of every question's tokens, [T, E] fp32 each."""
        embed = self.adapter.language_model.get_input_embeddings()
        ids = [self.adapter.encode_text(question) for question in questions]
        every = torch.tensor([number for one in ids for number in one], dtype=torch.long)
        with torch.no_grad():
            return embed(every.to(embed.weight.device)).float().split([len(one) for one in ids])

    def patches(self, projected: Tensor) -> Tensor:
        """Projected patches as they are, fp32."""
        return projected.float()

    def text_macs(self, questions: Sequence[str]) -> int:
        """Nothing: embeddings are looked up."""
        return 0


class CallQuestions:
    """The questions of one call in a space, embedded together when the first of them is asked for."""

    def __init__(self, space: Any, questions: Sequence[str]) -> None:
        self.space, self.distinct = space, questions

    @cached_property
    def _texts(self) -> dict[str, Tensor]:
        return dict(zip(self.distinct, self.space.text(self.distinct), strict=True))

    @cached_property
    def _words(self) -> dict[str, Tensor]:
        return dict(zip(self.distinct, self.space.words(self.distinct), strict=True))

    def text(self, questions: Sequence[str]) -> Tensor:
        """Of some of them, [B, E] fp32."""
        return torch.stack([self._texts[question] for question in questions])

    def words(self, questions: Sequence[str]) -> Tensor:
        """The tokens of some of them, [B, T, E] fp32, zeros behind shorter questions."""
        return pad_sequence([self._words[question] for question in questions], batch_first=True)

    def patches(self, normed: Tensor) -> Tensor:
        """Patches in the space, [B, N, D] -> [B, N, E] fp32."""
        return self.space.patches(normed)
