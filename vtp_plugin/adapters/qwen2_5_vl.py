"""Qwen2.5-VL: packed tower with window attention, 2x2 merger, M-RoPE (original positions kept)."""

from __future__ import annotations

from torch import Tensor, nn

from vtp_plugin.adapters.qwen import QwenVL, _function


class Qwen25VL(QwenVL):
    """transformers' Qwen2.5-VL."""

    family = "qwen2_5_vl"
    models = "Qwen2.5-VL"
    type_name = "Qwen2_5_VLForConditionalGeneration"

    def windows(self, visual: nn.Module, grid: Tensor) -> tuple[Tensor, Tensor]:
        return _function(visual, "get_vision_window_index")(grid, self.merge, visual.window_size, visual.patch_size)
