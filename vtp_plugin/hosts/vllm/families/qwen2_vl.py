"""Qwen2-VL inside vLLM: full attention per picture. vLLM hands it no positions, so it says that it sends them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtp_plugin.hosts.vllm import qwen, qwen_requests, qwen_tower
from vtp_plugin.surgery.passes import TowerPass

plan_of = qwen_requests.plan_of


class ProcessingInfo(qwen_requests.CountsMerged, Qwen2VLProcessingInfo):
    """How many tokens an image has."""


class Processor(qwen_requests.DecidesMerged, Qwen2VLMultiModalProcessor):
    """From pictures to pixel values and placeholders."""


class DummyInputs(qwen_requests.TextBehind, Qwen2VLDummyInputsBuilder):
    """What vLLM tries before it serves."""


class Parts(qwen_tower.PackedParts):
    """Where a Qwen2-VL has its parts; its workers share one matrix of queries, keys and values, cut anywhere."""

    def heads(self, module: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(part[:, 0] for part in module.split_qkv(module.qkv(hidden)[0]))

    def sequences(self, passing: TowerPass) -> dict[str, Any]:
        visual = self.tower.module
        ends = torch.tensor([0, *self.left(passing, self.frames(passing))], device=visual.device).cumsum(0).int()
        return {"cu_seqlens": ends, "max_seqlen": visual.compute_attn_mask_seqlen(ends)}


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class Pruned(qwen.AroundQwen, Qwen2VLForConditionalGeneration):
    """vLLM's Qwen2-VL with strategies around its tower."""

    parts = Parts
