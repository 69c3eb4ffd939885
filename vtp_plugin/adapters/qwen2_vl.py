"""Qwen2-VL: packed tower with full attention per frame, 2x2 merger, M-RoPE (original positions kept)."""

from __future__ import annotations

from vtp_plugin.adapters.qwen import QwenVL
from vtp_plugin.hosts.transformers.contract import FAMILIES


class Qwen2VL(QwenVL):
    """transformers' Qwen2-VL."""

    family = "qwen2_vl"
    touches = FAMILIES["qwen2_vl"]
    models = "Qwen2-VL"
    names = ("Qwen2VLForConditionalGeneration",)
