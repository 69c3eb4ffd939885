"""Qwen3-VL inside vLLM: rows of three tower layers ride behind the features of every token (deepstack)."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtp_plugin.hosts.vllm import qwen

plan_of = qwen.plan_of


class ProcessingInfo(qwen.CountsMerged, Qwen3VLProcessingInfo):
    """How many tokens an image has."""


class Processor(qwen.DecidesMerged, Qwen3VLMultiModalProcessor):
    """From pictures to pixel values and placeholders."""


class DummyInputs(qwen.TextBehind, Qwen3VLDummyInputsBuilder):
    """What vLLM tries before it serves."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class Pruned(qwen.AroundQwen, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL with strategies around its tower."""
