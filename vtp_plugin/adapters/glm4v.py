"""GLM-4.1V, GLM-4.5V and GLM-4.6V: packed tower, a strided convolution that merges 2x2 patches, original positions.

What goes into that convolution is a token's unit; it comes out of a norm, so its length says little. The placeholders
of a video's frames are those of images; the tower takes every frame as an image of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vtp_plugin.adapters.qwen import GRIDS, QwenVL
from vtp_plugin.contract import TouchPoint
from vtp_plugin.facts.costs import matrices
from vtp_plugin.hosts.compatibility import TRANSFORMERS
from vtp_plugin.hosts.transformers import contract


class Glm4v(QwenVL):
    """transformers' GLM-4.1V."""

    family = "glm4v"
    touches = (
        *contract.ROWS,
        *contract.packed(),
        TouchPoint(TRANSFORMERS, ".model.visual.downsample", "units of patches", takes=("input",)),
        TouchPoint(TRANSFORMERS, ".model.visual.embeddings", "kept patches", takes=("lengths", "image_shapes")),
    )
    models = "GLM-4.1V"
    names = ("Glm4vForConditionalGeneration",)
    parts = ("visual.downsample", "language_model")

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.tokens = dict.fromkeys(GRIDS, model.config.image_token_id)

    @property
    def projectors(self) -> Sequence[nn.Module]:
        return (self.core.visual.merger,)

    def pooling_macs(self, tokens: int) -> int:
        """The convolution, per patch."""
        return tokens * matrices(self.projector) // self.merge**2

    def units(self, entering: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """[S, D] in merge order -> what goes into the merger per image, [n, m D]."""
        totals = (inputs[GRIDS[kind]].prod(-1) // self.merge**2).tolist()
        return entering.flatten(2).transpose(1, 2).flatten(1).split(totals)


class Glm46V(Glm4v):
    """transformers' GLM-4.6V."""

    family = "glm46v"
    models = "GLM-4.6V"
    names = ("Glm46VForConditionalGeneration",)


class Glm4vMoe(Glm4v):
    """transformers' GLM-4.5V, and GLM-4.6V with experts."""

    family = "glm4v_moe"
    models = "GLM-4.5V (experts)"
    names = ("Glm4vMoeForConditionalGeneration",)
