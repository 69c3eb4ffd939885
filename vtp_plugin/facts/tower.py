"""The parts of a vision tower, and the space that some towers share with a text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Tower:
    """The parts of a vision transformer."""

    module: nn.Module  # called once per batch of images
    embeddings: nn.Module  # pixel values -> [B, prefix + N, D], position embeddings added
    patch_embedding: nn.Module  # pixel values -> [B, D, rows, columns]
    blocks: Sequence[nn.Module]  # each with `self_attn` (q_proj, k_proj, head_dim)
    post_layernorm: nn.Module | None
    prefix: int  # tokens in front of the patches: 1 for a class token, 0 if there is none
    grid: tuple[int, int]
    patch_size: int
    projected: int  # block whose output is projected, negative counts from the last
    attention: str = "self_attn"  # where a block's attention is
    between: tuple[str, str] | None = None  # a block's norm behind its attention, and the MLP behind that norm
    block: int = 1  # side of the square of patches that becomes one token of the prompt: dropped as a whole

    def number(self, layer: int | None) -> int:
        """A block counted from the first; None is the one whose output is projected."""
        layer = self.projected if layer is None else layer
        return layer + len(self.blocks) if layer < 0 else layer

    def attention_of(self, number: int) -> nn.Module:
        """The attention module of a block."""
        return getattr(self.blocks[number], self.attention)


class SharedSpace(Protocol):
    """CLIP's joint space of patches and questions, from the checkpoint that the vision tower comes from."""

    segments: bool  # what becomes of questions above the text tower's length: mean over pieces, else truncated

    def text(self, questions: Sequence[str]) -> Tensor:
        """Text embeddings [B, E] fp32."""

    def patches(self, normed: Tensor) -> Tensor:
        """Visual projection of post-layer-normed patches, [B, N, D] -> [B, N, E] fp32."""

    def text_macs(self, questions: Sequence[str]) -> int:
        """Multiply-accumulates of the text tower for these questions."""
