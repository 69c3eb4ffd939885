"""Qwen2.5-VL: packed tower with window attention, 2x2 merger, M-RoPE (original positions kept)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtp_plugin.adapters.qwen import QwenVL
from vtp_plugin.adapters.qwen_tower import function_of
from vtp_plugin.hosts.transformers.contract import FAMILIES
from vtp_plugin.surgery.call import Image


class Qwen25VL(QwenVL):
    """transformers' Qwen2.5-VL."""

    family = "qwen2_5_vl"
    touches = FAMILIES["qwen2_5_vl"]
    models = "Qwen2.5-VL"
    names = ("Qwen2_5_VLForConditionalGeneration",)

    def sequences(self, image: Image) -> Sequence[Sequence[int]]:
        rows, columns = (side * self.merge for side in image.grid)
        grid = torch.tensor([[image.tiles, rows // image.tiles, columns]])
        windows, frames = self.windows(self.tower.module, grid)[1].diff().tolist(), super().sequences(image)
        whole = self.tower.module.fullatt_block_indexes
        return [lengths if number in whole else windows for number, lengths in enumerate(frames)]

    def windows(self, visual: nn.Module, grid: Tensor) -> tuple[Tensor, Tensor]:
        return function_of(visual, "get_vision_window_index")(grid, self.merge, visual.window_size, visual.patch_size)
