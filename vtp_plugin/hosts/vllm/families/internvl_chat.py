"""InternVL inside vLLM from its own checkpoints (`InternVLChatModel`): tiles with pixel shuffle, plain positions.

Squares, tiles and budgets are those of `internvl`. vLLM makes tiles by a processor of its own, with the mean and
deviation of ImageNet, under which even bf16 tells all levels of a pixel apart: nothing has to be remembered.
"""

from __future__ import annotations

from functools import cached_property
from types import SimpleNamespace
from typing import Any

from vllm.model_executor.models.internvl import (
    InternVLChatModel,
    InternVLDummyInputsBuilder,
    InternVLMultiModalProcessor,
    InternVLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils.processors.internvl import IMAGENET_MEAN, IMAGENET_STD

from vtp_plugin.adapters.internvl_chat import InternVLChat, tower_of
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.vllm import tiled
from vtp_plugin.hosts.vllm.families import internvl
from vtp_plugin.hosts.vllm.plan import Plan
from vtp_plugin.hosts.vllm.worker import separate
from vtp_plugin.surgery.pixels import Pixels

IMAGENET = SimpleNamespace(image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)


def plan_of(config: Any) -> Plan:
    """The plan in a model configuration; PruningError if it cannot be served."""
    if why := InternVLChat.unlike_in(config):
        raise PruningError(f"this model is nearly {InternVLChat.models}, but {why}")
    vision = config.vision_config
    return internvl.plan_for(config, [vision.image_size] * 2, vision.patch_size, InternVLChat.models)


class ProcessingInfo(tiled.CountsTiles, InternVLProcessingInfo):
    """How many tokens an image has."""

    ctx_video_token = None  # no videos

    @cached_property
    def plan(self) -> Plan:
        return plan_of(self.get_hf_config())


class Processor(tiled.DecidesTiles, InternVLMultiModalProcessor):
    """From pictures to pixel values and placeholders."""

    values, number = "pixel_values_flat", "image_num_patches"

    def _pixels(self) -> Pixels:
        return Pixels.of(IMAGENET)


class Parts(internvl.Squares):
    """Where the model has its parts."""

    def __init__(self, model: Any, processor: Any) -> None:
        config = model.config
        tower = tower_of(model.vision_model, config, config.vision_config.image_size)
        super().__init__(model, tower, model.mlp1, processor)
        separate(tower, "qkv")


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=InternVLDummyInputsBuilder)
class Pruned(internvl.Around, InternVLChatModel):
    """vLLM's `InternVLChatModel` with strategies around its tower."""

    parts, values, number, tower = Parts, Processor.values, Processor.number, "vision_model"
    plan_of = staticmethod(plan_of)

    def image_processor(self, models: Any) -> Any:
        return IMAGENET
