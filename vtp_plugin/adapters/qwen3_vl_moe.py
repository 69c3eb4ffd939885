"""Qwen3-VL with experts: as Qwen3-VL, with several expert MLPs per decoder layer, of which a token passes a few."""

from __future__ import annotations

from vtp_plugin.adapters.qwen3_vl import Qwen3VL


class Qwen3VLMoe(Qwen3VL):
    """transformers' Qwen3-VL with experts."""

    family = "qwen3_vl_moe"
    models = "Qwen3-VL (experts)"
    names = ("Qwen3VLMoeForConditionalGeneration",)
