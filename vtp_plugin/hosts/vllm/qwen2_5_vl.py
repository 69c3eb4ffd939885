"""Qwen2.5-VL inside vLLM: window attention, so blocks see the units of an image window by window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtp_plugin.hosts.vllm import qwen
from vtp_plugin.surgery.passes import TowerPass

plan_of = qwen.plan_of


class ProcessingInfo(qwen.CountsMerged, Qwen2_5_VLProcessingInfo):
    """How many tokens an image has."""


class Processor(qwen.DecidesMerged, Qwen2_5_VLMultiModalProcessor):
    """From pictures to pixel values and placeholders."""


class DummyInputs(qwen.TextBehind, Qwen2_5_VLDummyInputsBuilder):
    """What vLLM tries before it serves."""


class Parts(qwen.PackedParts):
    """Where a Qwen2.5-VL has its parts; its tower has windows."""

    def order(self, passing: TowerPass) -> Tensor:
        orders = [self._tables(grid)[2] for grid in passing.grid.tolist()]
        return torch.cat([units + start for units, start in zip(orders, passing.offsets[:-1], strict=True)])

    def lengths(self, passing: TowerPass, number: int) -> list[int]:
        if number in self.tower.module.fullatt_block_indexes:
            return super().lengths(passing, number)
        ends = [self._tables(grid)[3] for grid in passing.grid.tolist()]
        return torch.cat([torch.nn.functional.pad(end, (1, 0)).diff() for end in ends]).tolist()

    def _tables(self, grid: Sequence[int]) -> tuple[Any, ...]:
        """Of one image: cosines, sines, order of the units, ends of the windows; vLLM remembers them."""
        return self.tower.module.get_rope_by_thw(*grid)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class Pruned(qwen.AroundQwen, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL with strategies around its tower."""

    parts = Parts
