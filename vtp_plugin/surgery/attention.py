"""Single attention rows, recomputed from q and k in fp32, so that no kernel is changed and no N x N map exists."""

from __future__ import annotations

import inspect
import sys

import torch
from torch import Tensor, nn


def heads(module: nn.Module, projection: str, hidden: Tensor) -> Tensor:
    """The heads of `q_proj` or `k_proj` of an attention module, [B, L, D] -> [B, H, L, d]."""
    projected = getattr(module, projection)(hidden)
    norm = getattr(module, projection.replace("proj", "norm"), None) or nn.Identity()
    whole = getattr(norm, "weight", None) is not None and len(norm.weight) != module.head_dim
    if whole:  # a norm over all heads at once
        return norm(projected).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
    return norm(projected.unflatten(-1, (-1, module.head_dim))).transpose(1, 2)


def parts(module: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of a module that makes them at once (`qkv`) or one by one, [S, D] -> [S, H, d] each."""
    if hasattr(module, "qkv"):
        return module.qkv(hidden).unflatten(-1, (3, module.num_heads, -1)).unbind(1)
    return tuple(getattr(module, name)(hidden).unflatten(-1, (module.num_heads, -1)) for name in ("q", "k", "v"))


def scale(module: nn.Module) -> float:
    """The factor of the logits."""
    return getattr(module, "scaling", getattr(module, "scale", module.head_dim**-0.5))


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Scaled logits as an attention module bends them in front of its softmax, below +- cap; None: as they are."""
    return logits if cap is None else (logits / cap).tanh() * cap


def cap(module: nn.Module) -> float | None:
    """What the logits of an attention module stay below, as in Gemma 2; None: nothing."""
    return getattr(module, "attn_logit_softcapping", None)


def window(module: nn.Module) -> int | None:
    """How many columns back an attention module sees, itself included; None: all of them."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    config = getattr(module, "config", None)  # one window for all layers, as in Mistral
    return None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)


def row(
    query: Tensor,
    keys: Tensor,
    factor: float,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    """Softmax of one query row, mean over heads: [B, H, d], [B, Hkv, L, d], visible [B, L] bool -> [B, L] fp32.

    `bias` [B, 1, L] is added to the logits, which stay below `limit`.
    """
    return head_rows(query, keys, factor, visible, bias, limit).mean(1)


def head_rows(
    query: Tensor,
    keys: Tensor,
    factor: float,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    """The same of every head, [B, H, L] fp32."""
    keys = keys.float().repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    logits = capped((keys @ query.float()[..., None]).squeeze(-1) * factor, limit)  # [B, H, L]
    logits = logits if bias is None else logits + bias
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None], float("-inf"))
    return logits.softmax(-1)


def rows(queries: Tensor, keys: Tensor, factor: float, visible: Tensor, limit: float | None = None) -> Tensor:
    """Softmax of several query rows, [H, T, d], [Hkv, L, d], visible [T, L] bool -> [H, T, L] fp32."""
    length, width = keys.shape[1:]
    shared = queries.float().reshape(len(keys), -1, width)  # heads that share a key, side by side
    logits = capped((shared @ keys.float().mT).mul_(factor), limit).view(len(queries), -1, length)
    return logits.masked_fill_(~visible, float("-inf")).softmax(-1)


def received(
    queries: Tensor, keys: Tensor, factor: float, bias: Tensor | None = None, real: Tensor | None = None
) -> Tensor:
    """Attention that every token receives, mean over queries and heads: [B, H, L, d] twice -> [B, L] fp32.

    `bias` [B, 1, L] is added to the logits; tokens that are not `real` [B, L] bool neither see nor are seen. What
    stands in for the class token's attention in towers that have none. A few queries at a time: maps are no larger
    than the queries.
    """
    heads, length = queries.shape[1:3]
    keys = keys.float().repeat_interleave(heads // keys.shape[1], dim=1)
    total = queries.new_zeros(len(queries), length, dtype=torch.float32)
    seeing = torch.ones_like(total) if real is None else real.float()  # [B, L]
    bias = bias if real is None else seeing.log()[:, None]
    some = queries.shape[-1]
    for few, weight in zip(queries.split(some, dim=2), seeing.split(some, dim=1), strict=True):
        logits = (few.float() @ keys.mT).mul_(factor)
        weights = (logits if bias is None else logits.add_(bias[:, None])).softmax(-1)
        total += (weights.sum(1) * weight[..., None]).sum(1)
    return total / (heads * seeing.sum(1, keepdim=True))


def rotated(module: nn.Module, query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding of the module's own file, [B, H, L, d] with cos and sin [B, L, d]."""
    turn = sys.modules[type(module).__module__].apply_rotary_pos_emb
    if "x" in inspect.signature(turn).parameters:  # of one tensor instead of queries and keys together
        return turn(query, cos, sin)
    return turn(query, query, cos, sin)[0]


def take(tensor: Tensor, columns: Tensor) -> Tensor:
    """Per row, the given columns of dimension 1: [B or 1, L, ...], [B, K] -> [B, K, ...]."""
    tensor, columns = tensor.expand(len(columns), *tensor.shape[1:]), columns.to(tensor.device)
    return tensor[torch.arange(len(columns), device=tensor.device)[:, None], columns]
