"""Theoretical cost of the prefill, from the model's configuration and the real token counts.

Counted in multiply-accumulates (MACs); FLOPs = 2 MACs. Per transformer layer on n tokens of width d:
    n d (2 d_q + 2 d_kv)      the four projections,
    2 n^2 d_q                 logits and weighted sum (the full square, causal or not),
    n d m (2, or 3 if gated)  the MLP,
which is 4 n d^2 + 2 n^2 d + 3 n d m for a LLaMA layer without grouped queries. Norms, activations, biases, softmax and
embeddings are left out. The vision tower, the projector, the decoder, the output layer for the last token and, where a
strategy reads the question through it, CLIP's text tower are counted, and the projector once more for strategies that
judge projected tokens; the comparison of scores is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from vtp_plugin.adapter import Tower


@dataclass(frozen=True)
class Transformer:
    """Sizes of a stack of equal layers."""

    layers: int
    width: int
    mlp: int
    gated: bool
    query_width: int
    key_value_width: int

    def layer_macs(self, tokens: int, left: int | None = None) -> int:
        """One layer on that many tokens; its MLP on those that are left where tokens are merged in between."""
        left = tokens if left is None else left
        projections = tokens * self.width * 2 * (self.query_width + self.key_value_width)
        attention = 2 * tokens**2 * self.query_width
        return projections + attention + left * self.width * self.mlp * (3 if self.gated else 2)

    def macs(self, tokens: int) -> int:
        """All layers on that many tokens."""
        return self.layers * self.layer_macs(tokens)


@dataclass(frozen=True)
class Shapes:
    """What a prefill is made of."""

    tower: Transformer
    prefix: int  # tokens of the tower in front of the patches
    patch: int  # MACs to embed one patch
    projector: int  # MACs to project one token
    llm: Transformer
    head: int  # MACs of the output layer for one token

    @classmethod
    def of(cls, vision: Any, text: Any, tower: Tower, projector: nn.Module) -> Shapes:
        """From the configurations of a plain vision transformer and a LLaMA, and the parts between them."""
        return cls(
            tower=of_config(vision, gated=False),
            prefix=tower.prefix,
            patch=3 * tower.patch_size**2 * vision.hidden_size,
            projector=sum(weight.numel() for weight in projector.parameters() if weight.ndim == 2),
            llm=of_config(text, gated=True),
            head=text.hidden_size * text.vocab_size,
        )

    def tower_macs(self, patches: int, blocks_see: int | Sequence[int], tiles: int = 1) -> int:
        """Embed `patches`, then run the blocks on the `blocks_see` patches that are left and the prefix.

        Several numbers: those that enter the first block, then those left behind the attention of each block.
        Tiles are sequences of their own, counted as equally long; windows inside one are counted as full attention.
        """
        left = [blocks_see] if isinstance(blocks_see, int) else list(blocks_see)
        left = [n // tiles + self.prefix for n in left + left[-1:] * (self.tower.layers + 1 - len(left))]
        return patches * self.patch + tiles * sum(self.tower.layer_macs(a, b) for a, b in pairwise(left))

    def prefill_macs(self, images: Sequence[tuple[int, int | Sequence[int], int, int]], lengths: Sequence[int]) -> int:
        """One sample: per image (patches, patches in the blocks, tiles, tokens projected); prompt length per layer."""
        tower = sum(
            self.tower_macs(patches, seen, tiles) + projected * self.projector
            for patches, seen, tiles, projected in images
        )
        return tower + sum(self.llm.layer_macs(length) for length in lengths) + self.head


def of_config(config: object, *, gated: bool) -> Transformer:
    """The sizes in a transformers configuration."""
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    return Transformer(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        mlp=config.intermediate_size,
        gated=gated,
        query_width=heads * head,
        key_value_width=key_value_heads * head,
    )
