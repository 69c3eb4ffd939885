"""LLaVA-1.5 inside vLLM: CLIP tower, MLP projector, plain positions."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.vllm import plan
from vtp_plugin.hosts.vllm.plan import KEY, Plan
from vtp_plugin.hosts.vllm.processing import CountsKept, Decides
from vtp_plugin.hosts.vllm.worker import AroundClip


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
class Pruned(AroundClip, LlavaForConditionalGeneration):
    """vLLM's LLaVA-1.5 with strategies around its tower."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.attach(vllm_config, prefix, plan_of(self.config))
