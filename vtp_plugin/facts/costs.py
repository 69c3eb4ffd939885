"""What the parts of a model cost per token, read off its own weights.

Counted in multiply-accumulates (MACs); FLOPs = 2 MACs. A transformer layer on n tokens costs
    n times the elements of its matrices (projections and MLP), and
    2 n^2 d_q                 for logits and weighted sum (the full square, causal or not),
which is 4 n d^2 + 2 n^2 d + 3 n d m for a LLaMA layer without grouped queries. Attention inside windows, frames or
tiles is counted per window, frame or tile. Norms, activations, biases, softmax and embedding tables are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vtp_plugin.facts.tower import Tower

PIECE = 64  # tokens that a recurrent layer takes at a time, in a pass over several


@dataclass(frozen=True)
class Layer:
    """One transformer layer."""

    projections: int  # MACs per token around the attention
    mlp: int  # MACs per token behind it
    width: int  # of all queries together
    cached: int = 0  # elements of keys and values per token
    keys: int = 0  # MACs per token to project keys
    window: int | None = None  # tokens that its KV cache holds at most
    state: int = 0  # a recurrent layer: elements of the state of all heads; it has no pairs of tokens
    within: int = 0  # a recurrent layer: MACs per token with the tokens of its own piece, beside those with the state
    held: int = 0  # elements that the cache holds whatever the number of tokens

    @classmethod
    def of(cls, layer: nn.Module, attention: str = "self_attn") -> Layer:
        """From a layer's modules; `attention` is where its attention is."""
        if hasattr(layer, "linear_attn"):
            return cls._recurrent(layer, layer.linear_attn)
        inner = getattr(layer, attention)
        projections, window = matrices(inner), getattr(inner, "sliding_window", None)
        cached = sum(_linear(inner, name).out_features for name in ("k_proj", "v_proj") if hasattr(inner, name))
        return cls(
            projections=projections,
            mlp=matrices(layer) - projections,
            width=_query_width(inner),
            cached=cached,
            keys=matrices(inner.k_proj) if hasattr(inner, "k_proj") else projections // 4,
            window=window - 1 if window else None,
        )

    @classmethod
    def _recurrent(cls, layer: nn.Module, inner: nn.Module) -> Layer:
        """A gated delta rule: heads with a state [d_k, d_v], PIECE tokens at a time, each of the piece with each."""
        projections, heads = matrices(inner), inner.num_v_heads
        widths, state = 2 * inner.head_k_dim + inner.head_v_dim, heads * inner.head_k_dim * inner.head_v_dim
        return cls(
            projections=projections,
            mlp=matrices(layer) - projections,
            width=0,
            state=state,
            within=PIECE * heads * widths,
            held=state + inner.conv_dim * inner.conv_kernel_size,
        )

    def macs(self, tokens: int, keys: int | None = None, leaving: int | None = None) -> int:
        """On that many tokens, which attend to `keys` (themselves); `leaving` (all) of them reach the MLP."""
        pairs = tokens * (tokens if keys is None else keys)
        mixed = self._passed(tokens) if self.state else 2 * pairs * self.width
        return tokens * self.projections + mixed + (tokens if leaving is None else leaving) * self.mlp

    def _passed(self, tokens: int) -> int:
        """MACs of a recurrent layer for tokens that pass its state: read, compared, written; a single one by itself."""
        if tokens == 1:
            return 3 * self.state
        return -(-tokens // PIECE) * PIECE * (3 * self.state + self.within)

    def reading(self, tokens: int, prefix: int) -> int:
        """Reading the class token's attention row once more; without one, what every token receives from all."""
        one = self.projections // 4  # queries, keys, values and output are equally wide in a tower
        return tokens * one + (one + tokens * self.width if prefix else tokens * one + tokens**2 * self.width)

    def cache(self, tokens: int) -> int:
        """Elements that the KV cache of the layer holds behind that many tokens."""
        return self.held + self.cached * (tokens if self.window is None else min(tokens, self.window))


@dataclass(frozen=True)
class Costs:
    """What a model is made of."""

    patch: int  # MACs to embed one patch
    blocks: tuple[Layer, ...]  # of the vision tower
    projectors: tuple[int, ...]  # MACs for one row that comes out of each projector
    layers: tuple[Layer, ...]  # of the language model
    head: int  # MACs of the output layer for one token

    @classmethod
    def of(
        cls, tower: Tower, projectors: Sequence[nn.Module], layers: Sequence[nn.Module], head: nn.Module | None
    ) -> Costs:
        """From the modules; `head` is the output layer of the language model, None where there is none."""
        return cls(
            patch=matrices(tower.patch_embedding),
            blocks=tuple(Layer.of(block, tower.attention) for block in tower.blocks),
            projectors=tuple(matrices(projector) for projector in projectors),
            layers=tuple(Layer.of(layer) for layer in layers),
            head=0 if head is None else matrices(head),
        )


def matrices(module: nn.Module) -> int:
    """Elements of all matrices and kernels of a module, without embedding tables: its MACs per token.

    Of experts, which a router chooses for every token, as many as it chooses.
    """
    parts = list(module.modules())
    routers = [part for part in parts if {"experts", "gate"} <= part._modules.keys()]
    idle = {part for block in routers for part in block.experts.modules()}
    return sum(_own_matrices(part) for part in parts if part not in idle) + sum(map(_routed, routers))


def _routed(block: nn.Module) -> int:
    """MACs per token of the experts that a token passes, by the choice of the block's router, `gate`."""
    total = sum(map(_own_matrices, block.experts.modules()))
    return total * block.gate.top_k // block.experts.num_experts


def _own_matrices(module: nn.Module) -> int:
    if isinstance(module, nn.Embedding):
        return 0
    if isinstance(module, nn.Linear):  # packed weights (4 bit) have other shapes
        return module.in_features * module.out_features
    return sum(weight.numel() for weight in module._parameters.values() if weight is not None and weight.ndim > 1)


def _linear(attention: nn.Module, name: str) -> nn.Module:
    """The linear layer of a projection, which a wrapper may hold; that of the keys, where they are the values, too."""
    projection = getattr(attention, name)
    parts = (attention.k_proj if projection is None else projection).modules()
    return next(part for part in parts if hasattr(part, "out_features"))


def _query_width(attention: nn.Module) -> int:
    """Width of the queries of all heads, projected by themselves, with keys and values, or with a gate."""
    if hasattr(attention, "o_proj"):
        return _linear(attention, "o_proj").in_features
    one = getattr(attention, "q_proj", getattr(attention, "q", None))
    return attention.qkv.out_features // 3 if one is None else one.out_features
