"""LLaVA-NeXT (1.6) inside vLLM: CLIP tower, tiles of any resolution, newline rows.

vLLM puts the tiles together; signals travel through its own packing (`surgery.tiles`), as under transformers. Newline
rows are always kept and count in no budget; keep_ratio and keep_tokens count over the image, base and crops together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtp_plugin.hosts.vllm.families import llava
from vtp_plugin.hosts.vllm.plan import Plan
from vtp_plugin.hosts.vllm.processing import Decides
from vtp_plugin.hosts.vllm.worker import AroundClip, ClipParts
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.tiles import TILED
from vtp_plugin.surgery.undo import Undo


def plan_of(config: Any) -> Plan:
    """The plan in a model configuration; PruningError if it cannot be served."""
    chosen = llava.plan_of(config)
    for strategy in chosen.strategies:
        if strategy.stage is not Stage.PROJECTOR:
            raise strategy.error(
                "of LLaVA-NeXT inside vLLM only the projector stage is served: how many rows are left of patches that "
                "are dropped before follows from the padding that is cut away"
            )
    return chosen


class ProcessingInfo(LlavaNextProcessingInfo):
    """How many tokens an image has."""

    @cached_property
    def plan(self) -> Plan:
        return plan_of(self.get_hf_config())

    def _get_num_unpadded_features(self, **geometry: int) -> tuple[int, int]:
        """Rows of the crops that stay beside the base tile's, which vLLM adds, and newlines."""
        crops, newlines = super()._get_num_unpadded_features(**geometry)
        return self.plan.count(self.plan.whole + crops) - self.plan.whole, newlines


class Processor(Decides, LlavaNextMultiModalProcessor):
    """From pictures to pixel values and placeholders."""


class Tiles(ClipParts):
    """Images of several tiles."""

    layout = TILED
    tiled = True
    tokenwise = True

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        """The images of a call before vLLM packs their tiles, [T, 3, H, W] each."""
        nothing, patches = torch.arange(0), self.tower.grid[0] * self.tower.grid[1]
        sizes = [len(tiles) for tiles in inputs["pixel_values"]]
        return [Image(0, nothing, tiles=n, patches=n * patches, projectable=n * patches) for n in sizes]

    def encode(self, call: Call, encode: Callable[..., Any], inputs: Mapping[str, list[Tensor]]) -> Iterable[Tensor]:
        """Encode and pack all tiles as vLLM does, then take rows out."""
        tiles = inputs["pixel_values"]
        call.tower.owners = [number for number, image in zip(call.batch, tiles, strict=True) for _ in image]
        call.tower.inputs = inputs
        packed = encode(pixel_values=tiles, image_sizes=torch.stack(inputs["image_sizes"]))
        for number, rows in zip(call.batch, packed, strict=True):
            call.images[number].total = len(rows)
            call.images[number].index = torch.arange(len(rows), device=rows.device)
        return [rows for rows, _ in self.pruned.vision.rows(packed)]

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Channels [T, N, C] through vLLM's packing, newlines nan."""
        parts = maps.split([len(tiles) for tiles in inputs["pixel_values"]])
        with Undo() as undo:
            undo.override(self.model, "image_newline", maps.new_full(maps.shape[-1:], float("nan")))
            merge = self.model._merge_image_patch_embeddings
            sizes = inputs["image_sizes"]
            return [merge(size, part, strategy="spatial_unpad") for size, part in zip(sizes, parts, strict=True)]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder)
class Pruned(AroundClip, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT with strategies around its tower."""

    parts = Tiles

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.attach(vllm_config, prefix, plan_of(self.config))
