"""LLaVA-1.5 inside vLLM: CLIP tower, MLP projector, plain positions."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor
from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils.processor import cached_image_processor_from_config

from vtp_plugin.adapters.clip import clip_tower
from vtp_plugin.errors import PruningError
from vtp_plugin.integrations.vllm import plan
from vtp_plugin.integrations.vllm.plan import KEY, Plan
from vtp_plugin.integrations.vllm.processing import KEEP, QUESTION, CountsKept, Decides
from vtp_plugin.integrations.vllm.worker import Parts, Served


def plan_of(config: Any) -> Plan:
    """The plan in a model configuration; PruningError if it cannot be served."""
    vision = config.vision_config
    plain = isinstance(config.vision_feature_layer, int) and config.vision_feature_select_strategy == "default"
    if vision.model_type != "clip_vision_model" or not plain:
        raise PruningError("of this architecture, models with a CLIP tower and one projected layer are supported")
    return plan.plan_of(getattr(config, KEY), vision)


class ProcessingInfo(CountsKept, LlavaProcessingInfo):
    """How many tokens an image has."""

    @cached_property
    def plan(self) -> Plan:
        return plan_of(self.get_hf_config())


class Processor(Decides, LlavaMultiModalProcessor):
    """From pictures to pixel values and placeholders."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder)
class Pruned(LlavaForConditionalGeneration):
    """vLLM's LLaVA-1.5 with strategies around its tower."""

    supports_tower_connector_lora = False  # its bookkeeping takes the tower's length from the prompt

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not isinstance(self.vision_tower, CLIPVisionModel):
            return  # --limit-mm-per-prompt image=0: no tower, no picture
        chosen = plan_of(self.config)
        layer = -1  # of a tower that ends with the projected block
        if chosen.whole_tower:
            layer = self.config.vision_feature_layer
            with self._mark_tower_model(vllm_config, "image"):
                self.vision_tower = CLIPVisionModel(
                    self.config.vision_config,
                    quant_config=vllm_config.quant_config,
                    require_post_norm=True,
                    prefix=maybe_prefix(prefix, "vision_tower"),
                )
        self._select = [layer] if chosen.whole_tower else None
        processor = cached_image_processor_from_config(vllm_config.model_config)
        parts = Parts(self, clip_tower(self.vision_tower, layer), self.multi_modal_projector, processor)
        at_once = max(1, vllm_config.scheduler_config.max_num_batched_tokens // chosen.whole)
        self.vtp = Served(self, parts, chosen, at_once)

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: Tensor) -> Tensor:
        strategy = self.config.vision_feature_select_strategy
        return vision_tower(pixel_values, select_layers=self._select, feature_select_strategy=strategy)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        keep, questions = kwargs.pop(KEEP, None), kwargs.pop(QUESTION, None)
        return self.vtp.embed(super().embed_multimodal, kwargs["pixel_values"], keep, questions)
