"""InternVL inside vLLM, as transformers saves it: tiles with pixel shuffle, plain positions.

A token is a square of patches (2x2). keep_ratio and keep_tokens count over the image, all of its tiles together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtp_plugin.adapters.internvl import InternVL, tower_of
from vtp_plugin.hosts.vllm import tiled
from vtp_plugin.hosts.vllm.plan import KEY, Plan, planned


def plan_of(config: Any) -> Plan:
    """The plan in a model configuration; PruningError if it cannot be served."""
    return plan_for(config, config.vision_config.image_size, config.vision_config.patch_size[0], InternVL.models)


def plan_for(config: Any, sides: Sequence[int], patch: int, models: str) -> Plan:
    """The same for tiles of rows and columns of pixels, and patches of so many."""
    unit = patch * round(1 / config.downsample_ratio)
    grid = tuple(side // unit for side in sides)
    chosen = planned(getattr(config, KEY), grid, unit, config.vision_config.num_hidden_layers, False, True)
    return tiled.checked(chosen, models, tiled.ABSENT)


class ProcessingInfo(tiled.CountsTiles, InternS1ProcessingInfo):
    """How many tokens an image has."""

    @cached_property
    def plan(self) -> Plan:
        return plan_of(self.get_hf_config())


class Processor(tiled.DecidesTiles, InternS1MultiModalProcessor):
    """From pictures to pixel values and placeholders."""

    number = "image_num_patches"


class Squares(tiled.TiledParts):
    """A model whose tokens are made by a pixel shuffle."""

    def rows(self, encode: Callable[..., Any], inputs: Mapping[str, list[Tensor]]) -> Sequence[Tensor]:
        tiles, numbers = inputs["pixel_values"], [len(image) for image in inputs["pixel_values"]]
        given = {"image_num_patches": torch.tensor(numbers), "image_token_id": inputs["image_token_id"][0]}
        return encode(**{self.model.values: torch.cat(tiles)}, **given)

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        square = maps.unflatten(1, self.tower.grid).contiguous()
        shuffled = self.model.pixel_shuffle(square, scale_factor=self.model.downsample_ratio)
        rows = shuffled.flatten(1, 2).unflatten(-1, (-1, maps.shape[-1])).mean(-2)  # [T, n, C]
        return self.by_image(rows, inputs)

    def units(self, entering: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        return self.by_image(entering, inputs)  # behind the pixel shuffle


class Around(tiled.AroundTiles):
    """Mixed into such a model."""

    def shared(self, kwargs: Mapping[str, Any], images: Sequence[Tensor]) -> dict[str, Any]:
        return {"image_token_id": torch.as_tensor(kwargs["image_token_id"]).flatten()[:1].expand(len(images))}


class Parts(Squares):
    """Where an InternVL has its parts."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, tower_of(model.vision_tower, model.config), model.multi_modal_projector, processor)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=InternS1DummyInputsBuilder)
class Pruned(Around, InternS1ForConditionalGeneration):
    """vLLM's InternVL with strategies around its tower."""

    parts, number, plan_of = Parts, Processor.number, staticmethod(plan_of)
