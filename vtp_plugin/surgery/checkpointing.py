"""Gradient checkpointing: a layer runs once more in the backward pass, when the call that it belonged to is over."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def runs_again(layer: nn.Module, hidden: Tensor) -> bool:
    """Whether the backward pass will run a layer again that is called with hidden states [B, L, D] now."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    if not torch.is_grad_enabled():  # so the reentrant kind computes first, hooks and all, where they run again
        return with_its_hooks(layer) and hidden.requires_grad
    return hidden.requires_grad or any(weights.requires_grad for weights in layer.parameters())


def with_its_hooks(layer: nn.Module) -> bool:
    """Whether a layer's own hooks run again, too: transformers up to 5.22 checkpoints what is around them."""
    return type(layer).__call__ is not nn.Module.__call__
