"""Qwen3-VL: packed tower, 2x2 merger, deepstack (rows of three tower layers are added to the first decoder layers).

The deepstack rows of dropped tokens are dropped with them; a merged token takes those of the token it is built on.
Between decoder layers, the first cut comes behind the last layer that deepstack adds to. Original positions are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vtp_plugin.adapters import v5_17
from vtp_plugin.adapters.qwen import QwenVL
from vtp_plugin.adapters.qwen_tower import interpolated
from vtp_plugin.hosts.transformers.contract import FAMILIES
from vtp_plugin.surgery.columns import Rows


class Qwen3VL(QwenVL):
    """transformers' Qwen3-VL."""

    family = "qwen3_vl"
    touches = FAMILIES["qwen3_vl"]
    models = "Qwen3-VL"
    names = ("Qwen3VLForConditionalGeneration",)

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        depths = len(self.core.visual.deepstack_visual_indexes)
        self.first_cut = max(1, depths)
        self.cannot_cut = f"its first {depths} decoder layers still add features of the vision tower (deepstack)"

    @property
    def projectors(self) -> Sequence[nn.Module]:
        return (self.projector, *self.core.visual.deepstack_merger_list)

    def kept_arguments(self, visual: nn.Module, grid: Tensor) -> dict[str, Tensor]:
        """Position ids [S, 2], and the four table entries of every patch with their weights, [S, 4]."""
        return super().kept_arguments(visual, grid) | interpolated(visual, grid, self.merge)

    def join(self, output: Any, kind: str, rows: Sequence[Tensor], left: Sequence[Rows]) -> Any:
        levels = output.deepstack_features
        if v5_17.is_host():  # the rows of all images in one tensor
            levels = [level.split([len(image) for image in output.pooler_output]) for level in levels]
        output = super().join(output, kind, rows, left)
        output.deepstack_features = [
            type(level)(image[kept.source.clamp(min=0)] for image, kept in zip(level, left, strict=True))
            for level in levels
        ]
        return output
