"""Qwen3.5: the packed tower of Qwen3-VL without deepstack, 2x2 merger, original positions; three of four decoder layers
are recurrent (gated delta rule).

A recurrent layer takes every token into its state, from where none can be dropped: there is no llm stage.
"""

from __future__ import annotations

from torch import Tensor, nn

from vtp_plugin.adapters.qwen import QwenVL
from vtp_plugin.adapters.qwen_tower import interpolated
from vtp_plugin.contract import TouchPoint
from vtp_plugin.hosts.compatibility import TRANSFORMERS
from vtp_plugin.hosts.transformers import contract
from vtp_plugin.stages import Stage

RECURRENT = "its recurrent layers (linear attention) have the dropped tokens in their state by then"


class Qwen35(QwenVL):
    """transformers' Qwen3.5 with images."""

    family = "qwen3_5"
    touches = (
        *contract.SHARED,
        *contract.prompt(),
        *contract.repeated(),
        *contract.packed("get_vision_interpolation_indices_and_weights"),
        TouchPoint(
            TRANSFORMERS,
            ".model.visual",
            "positions of kept patches",
            has=("num_grid_per_side", "interpolation_mode", "interpolation_align_corners"),
        ),
        TouchPoint(
            TRANSFORMERS, ".model.language_model.layers.0.linear_attn", "FLOPs", has=("head_k_dim", "num_v_heads")
        ),
    )
    models = "Qwen3.5"
    names = ("Qwen3_5ForConditionalGeneration",)
    stages = {Stage.PIXELS: "", Stage.VIT: "", Stage.PROJECTOR: "", Stage.LLM: RECURRENT}

    def kept_arguments(self, visual: nn.Module, grid: Tensor) -> dict[str, Tensor]:
        """Position ids [S, 2], and the four table entries of every patch with their weights, [S, 4]."""
        return super().kept_arguments(visual, grid) | interpolated(visual, grid, self.merge)
