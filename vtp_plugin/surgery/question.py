"""The question in a prompt, without the chat template around it, and in the language model's own space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtp_plugin.errors import PruningError
from vtp_plugin.facts.conversation import framed, question_of
from vtp_plugin.facts.family import Family

__all__ = ["EmbeddedQuestions", "framed", "question_of"]


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
        distinct = {question: self._embedded(question) for question in set(questions)}
        return torch.stack([distinct[question] for question in questions])

    def words(self, questions: Sequence[str]) -> Tensor:
        """Input embeddings of every question's tokens, [B, T, E] fp32, zeros behind shorter ones."""
        return pad_sequence([self._tokens(question) for question in questions], batch_first=True)

    def patches(self, projected: Tensor) -> Tensor:
        """Projected patches as they are, fp32."""
        return projected.float()

    def text_macs(self, questions: Sequence[str]) -> int:
        """Nothing: embeddings are looked up."""
        return 0

    def _embedded(self, question: str) -> Tensor:
        return self._tokens(question).mean(0)

    def _tokens(self, question: str) -> Tensor:
        embed = self.adapter.language_model.get_input_embeddings()
        ids = self.adapter.encode_text(question)
        with torch.no_grad():
            return embed(torch.tensor(ids, device=embed.weight.device)).float()
