"""Attention kernels of one's own under a name that a configuration can say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def register(name: str, kernel: Callable[..., Any]) -> None:
    """Let modules whose configuration says `_attn_implementation=name` compute their attention with this function."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, kernel)
