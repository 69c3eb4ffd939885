"""Qwen3.5 with experts: as Qwen3.5, with several expert MLPs per decoder layer, of which a token passes a few."""

from __future__ import annotations

from vtp_plugin.adapters.qwen3_5 import Qwen35


class Qwen35Moe(Qwen35):
    """transformers' Qwen3.5 with experts and images."""

    family = "qwen3_5_moe"
    models = "Qwen3.5 (experts)"
    names = ("Qwen3_5MoeForConditionalGeneration",)
