"""Qwen3-VL inside vLLM: rows of three tower layers ride behind the features of every token (deepstack)."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtp_plugin.hosts.vllm import qwen, qwen_requests, qwen_tower
from vtp_plugin.surgery.passes import TowerPass

plan_of = qwen_requests.plan_of


class ProcessingInfo(qwen_requests.CountsMerged, Qwen3VLProcessingInfo):
    """How many tokens an image has."""


class Processor(qwen_requests.DecidesMerged, Qwen3VLMultiModalProcessor):
    """From pictures to pixel values and placeholders."""


class DummyInputs(qwen_requests.TextBehind, Qwen3VLDummyInputsBuilder):
    """What vLLM tries before it serves."""


class Parts(qwen_tower.PackedParts):
    """Where a Qwen3-VL has its parts."""

    def sequences(self, passing: TowerPass) -> dict[str, Any]:
        names = "cu_seqlens", "max_seqlen", "sequence_lengths"
        found = qwen_tower.spans(self.tower.module, self.left(passing, self.frames(passing)))
        return dict(zip(names, found, strict=True))


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class Pruned(qwen.AroundQwen, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL with strategies around its tower."""

    parts = Parts
