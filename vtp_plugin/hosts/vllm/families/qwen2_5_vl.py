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

from vtp_plugin.hosts.vllm import qwen, qwen_requests, qwen_tower
from vtp_plugin.surgery.passes import TowerPass

plan_of = qwen_requests.plan_of


class ProcessingInfo(qwen_requests.CountsMerged, Qwen2_5_VLProcessingInfo):
    """How many tokens an image has."""


class Processor(qwen_requests.DecidesMerged, Qwen2_5_VLMultiModalProcessor):
    """From pictures to pixel values and placeholders."""


class DummyInputs(qwen_requests.TextBehind, Qwen2_5_VLDummyInputsBuilder):
    """What vLLM tries before it serves."""


class Parts(qwen_tower.PackedParts):
    """Where a Qwen2.5-VL has its parts; its tower has windows."""

    def order(self, passing: TowerPass) -> Tensor:
        orders = [self._tables(grid)[2] for grid in passing.grid.tolist()]
        return torch.cat([units + start for units, start in zip(orders, passing.offsets[:-1], strict=True)])

    def lengths(self, passing: TowerPass, number: int) -> list[int]:
        whole = number in self.tower.module.fullatt_block_indexes
        return self.frames(passing) if whole else self.windows(passing)

    def windows(self, passing: TowerPass) -> list[int]:
        """Of the windows of images, which attend to themselves in the other blocks, in patches."""
        ends = [self._tables(grid)[3] for grid in passing.grid.tolist()]
        return torch.cat([torch.nn.functional.pad(end, (1, 0)).diff() for end in ends]).tolist()

    def sequences(self, passing: TowerPass) -> dict[str, Any]:
        found = {}
        for kind, ends, lengths in (
            ("full", "cu_seqlens", self.frames(passing)),
            ("window", "cu_window_seqlens", self.windows(passing)),
        ):
            names = ends, f"max_seqlen_{kind}", f"sequence_lengths_{kind}"
            spans = qwen_tower.spans(self.tower.module, self.left(passing, lengths))
            found |= dict(zip(names, spans, strict=True))
        return found

    def ordered(self, order: Tensor) -> dict[str, Tensor]:
        return {"window_index": order, "reverse_indices": order.argsort()}

    def _tables(self, grid: Sequence[int]) -> tuple[Any, ...]:
        """Of one image: cosines, sines, order of the units, ends of the windows; vLLM remembers them."""
        return self.tower.module.get_rope_by_thw(*grid)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class Pruned(qwen.AroundQwen, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL with strategies around its tower."""

    parts = Parts
