"""The process that takes requests for a Qwen-VL: images of any size, so the budget counts over the units of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.processing import PromptReplacement

from vtp_plugin import plugins
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.vllm.plan import KEY, Plan, planned
from vtp_plugin.hosts.vllm.processing import KEEP, CountsKept, Decides
from vtp_plugin.hosts.vllm.qwen_tower import PackedParts
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.pixels import squares
from vtp_plugin.surgery.positions import Choice

GRID = (24, 24)  # of an image, until one is seen
ABSENT = {"text", "aligned", "class_query"}  # signals of towers that CLIP trained


def models_of(config: Any) -> str:
    """What users know a model as, from its configuration."""
    return next(cls.models for cls in plugins.adapters() if cls.family == config.model_type)


def plan_of(config: Any) -> Plan:
    """The plan in a model configuration; PruningError if it cannot be served."""
    vision, models = config.vision_config, models_of(config)
    chosen = planned(getattr(config, KEY), GRID, vision.patch_size, vision.depth, True, True)
    for strategy in chosen.strategies:
        if strategy.stage is Stage.PIXELS and strategy.merges:
            raise strategy.error(f"new patches have no place in the vision tower of {models}: use one that drops them")
        if ABSENT & set(strategy.needs):
            raise strategy.error(
                f"{models} has no CLIP text encoder and no class token, and text_encoder=llm is not possible inside "
                f"vLLM: use a strategy that reads neither"
            )
    Choice.of(chosen.strategies, PackedParts)
    return chosen


class CountsMerged(CountsKept):
    """Mixed into a family's processing info: how many tokens an image has."""

    @cached_property
    def plan(self) -> Plan:
        return plan_of(self.get_hf_config())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": 0}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        if modality == "video" and num_items:
            models = models_of(self.get_hf_config())
            raise PruningError(f"a pruned {models} takes no videos inside vLLM: send frames as images")
        super().validate_num_items(modality, num_items)

    def get_num_image_tokens(self, **picture: Any) -> int:
        size, _ = self._get_vision_info(modality="image", **picture)
        vision = self.get_hf_config().vision_config
        return self.kept(1, size.height // vision.patch_size, size.width // vision.patch_size)

    def kept(self, frames: int, rows: int, columns: int, decided: Tensor | None = None) -> int:
        """How many tokens an image of frames x rows x columns patches has in the prompt.

        `decided` [N] bool: what strategies that look at its pixels leave.
        """
        merge = self.get_hf_config().vision_config.spatial_merge_size
        plan = self.plan.at((frames * rows // merge, columns // merge))
        return plan.count(plan.whole if decided is None else int(decided.sum()))


class DecidesMerged(Decides):
    """Mixed into a family's multi-modal processor: from pictures to pixel values and placeholders."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        if inputs.mm_data_items.get("image") and inputs.prompt[-1] == self.info.get_hf_config().image_token_id:
            raise PruningError("the prompt ends with a picture, but new tokens are numbered behind text: add some")
        return super().apply(inputs, timing_ctx)

    def _decisions(self, outputs: Any) -> Sequence[Tensor]:
        """A unit is one larger patch."""
        vision, values = self.info.get_hf_config().vision_config, outputs["pixel_values"]
        merge, size = vision.spatial_merge_size, vision.patch_size
        patches = values.unflatten(1, (3, -1, size))  # [S, 3, t * p, p], uint8 where the tower is to normalise them
        levels = patches if values.dtype is torch.uint8 else self.pixels.levels(patches)
        grids = outputs["image_grid_thw"]
        decisions = []
        for own, (_, rows, columns) in zip(levels.split(grids.prod(-1).tolist()), grids.tolist(), strict=True):
            units = squares(own.unflatten(0, (-1, merge**2)), merge, size, False)  # [U, 3, m * p, m * p]
            decisions.append(self.plan.at((rows // merge, columns // merge)).decide(units[None]))
        return decisions

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        token = self.info.get_hf_config().image_token_id

        def placeholders(number: int) -> list[int]:
            image = out_mm_kwargs["image"][number]
            decided = image[KEEP].data if self.plan.decided else None
            return [token] * self.info.kept(*image["image_grid_thw"].data.tolist(), decided)

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]


class TextBehind:
    """Mixed into what vLLM tries before it serves: text behind the pictures."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return super().get_dummy_text(mm_counts) + "."
