"""Gemma 3 inside vLLM: SigLIP tower, average pooling to 256 tokens, plain positions.

A token is a square of patches (4x4). A crop of pan-and-scan is an image of its own, with a budget of its own. vLLM lets
the tokens that are left of an image see each other both ways where its attention can: not on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.gemma3_mm import (
    Gemma3DummyInputsBuilder,
    Gemma3ForConditionalGeneration,
    Gemma3MultiModalProcessor,
    Gemma3ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtp_plugin.adapters.gemma3 import Gemma3
from vtp_plugin.adapters.rows import flat_tower
from vtp_plugin.hosts.vllm import tiled
from vtp_plugin.hosts.vllm.plan import KEY, Plan, planned
from vtp_plugin.hosts.vllm.worker import separate

NOT_THERE = tiled.ABSENT | {"class_query"}  # SigLIP has no class token


def plan_of(config: Any) -> Plan:
    """The plan in a model configuration; PruningError if it cannot be served."""
    vision, side = config.vision_config, round(config.mm_tokens_per_image**0.5)
    settings, patch = getattr(config, KEY), vision.image_size // side
    chosen = planned(settings, (side, side), patch, vision.num_hidden_layers, False, True)
    return tiled.checked(chosen, Gemma3.models, NOT_THERE)


class ProcessingInfo(tiled.CountsTiles, Gemma3ProcessingInfo):
    """How many tokens an image has."""

    @cached_property
    def plan(self) -> Plan:
        return plan_of(self.get_hf_config())

    def get_max_image_tokens(self) -> int:
        size, processor = self.get_image_size_with_most_features(), self.get_hf_processor()
        picture = {"image_width": size.width, "image_height": size.height}
        return self.get_num_image_tokens(**picture, processor=processor, mm_kwargs={})


class Processor(tiled.DecidesTiles, Gemma3MultiModalProcessor):
    """From pictures to pixel values and placeholders."""

    number, per_tile = "num_patches", True


class Parts(tiled.TiledParts):
    """Where a Gemma 3 has its parts."""

    def __init__(self, model: Any, processor: Any) -> None:
        projector = model.multi_modal_projector
        super().__init__(model, flat_tower(model.vision_tower, -1, block=projector.kernel_size), projector, processor)
        separate(self.tower)

    def rows(self, encode: Callable[..., Any], inputs: Mapping[str, list[Tensor]]) -> Sequence[Tensor]:
        tiles = inputs["pixel_values"]
        return encode(pixel_values=torch.cat(tiles), num_patches=torch.ones(len(tiles), dtype=torch.long))

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        square = maps.unflatten(1, self.tower.grid).permute(0, 3, 1, 2)
        return list(self.projector.avg_pool(square).flatten(2).transpose(1, 2))

    units = Gemma3.units


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=Gemma3DummyInputsBuilder)
class Pruned(tiled.AroundTiles, Gemma3ForConditionalGeneration):
    """vLLM's Gemma 3 with strategies around its tower."""

    parts, number, per_tile, plan_of = Parts, Processor.number, True, staticmethod(plan_of)
