"""Command A Vision: as Aya Vision, without a norm in the projector."""

from __future__ import annotations

from vtp_plugin.adapters.aya_vision import AyaVision


class Cohere2Vision(AyaVision):
    """transformers' Command A Vision."""

    family = "cohere2_vision"
    models = "Command A Vision"
    names = ("Cohere2VisionForConditionalGeneration",)
    facts = {"vision_config.model_type": "siglip_vision_model", "text_config.model_type": "cohere2"}
