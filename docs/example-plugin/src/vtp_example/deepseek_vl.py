"""DeepSeek-VL: a SigLIP tower, an MLP on every patch, LLaMA. One image is one run of placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin import Stage
from vtp_plugin.adapters.rows import RowsAdapter, flat_tower
from vtp_plugin.surgery.call import Image


class DeepseekVL(RowsAdapter):
    """transformers' DeepSeek-VL."""

    family = "deepseek_vl"
    models = "DeepSeek-VL"
    names = ("DeepseekVLForConditionalGeneration",)
    facts = {"vision_config.model_type": "siglip_vision_model"}
    stages = dict.fromkeys(Stage, "")  # or, per stage, the reason why it is not possible
    parts = ("aligner", "language_model")  # where model.model has its projector and its language model

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.tower = flat_tower(self.core.vision_model, -1)  # what its last block makes is projected

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        values = inputs["pixel_values"]  # [images, 3, H, W]
        n = self.tower.grid[0] * self.tower.grid[1]
        index = torch.arange(n, device=values.device)
        return [Image(total=n, index=index, patches=n, projectable=n) for _ in values]

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        return list(maps)  # [images, N, C]: a row for every patch, in raster order

    def pack(self, rows: Sequence[Tensor], kind: str, host: Tensor) -> Tensor:
        even = len({len(image) for image in rows}) == 1
        return torch.stack(list(rows)) if even else torch.cat(list(rows))
