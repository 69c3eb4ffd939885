"""Qwen3-VL with experts inside vLLM: as Qwen3-VL, with several expert MLPs per decoder layer."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtp_plugin.hosts.vllm import qwen, qwen_requests
from vtp_plugin.hosts.vllm.families import qwen3_vl

plan_of = qwen_requests.plan_of


class ProcessingInfo(qwen_requests.CountsMerged, Qwen3VLMoeProcessingInfo):
    """How many tokens an image has."""


@MULTIMODAL_REGISTRY.register_processor(qwen3_vl.Processor, info=ProcessingInfo, dummy_inputs=qwen3_vl.DummyInputs)
class Pruned(qwen.AroundQwen, Qwen3VLMoeForConditionalGeneration):
    """vLLM's Qwen3-VL with experts, with strategies around its tower."""

    parts = qwen3_vl.Parts
