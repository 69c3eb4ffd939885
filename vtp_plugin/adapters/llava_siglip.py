"""LLaVA with a SigLIP tower in transformers (llava-interleave, JoyCaption): the whole output of the tower is projected.

As LLaVA-1.5, without a class token: the attention that a patch receives, mean over queries, stands in for the class
token's. Positions are renumbered after a cut.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vtp_plugin.adapters.llava_hf import LlavaHf
from vtp_plugin.adapters.rows import flat_tower, pooled_macs
from vtp_plugin.facts.family import Family


class LlavaSiglip(LlavaHf):
    """transformers' LLaVA with a SigLIP tower."""

    family = "llava_siglip"
    models = "LLaVA with SigLIP (transformers)"
    facts = {
        "vision_config.model_type": "siglip_vision_model",
        "vision_feature_layer": int,
        "vision_feature_select_strategy": "full",
    }
    shared_space = Family.shared_space  # CLIP's text tower does not fit

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.tower = flat_tower(self.core.vision_tower, model.config.vision_feature_layer)

    def pooling_macs(self, tokens: int) -> int:
        """The tower pools its output where its configuration has not said otherwise; nobody looks at it."""
        return pooled_macs(self.core.vision_tower, tokens)
