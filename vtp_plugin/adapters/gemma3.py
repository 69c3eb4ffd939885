"""Gemma 3: SigLIP tower, average pooling to 256 tokens, bidirectional attention inside an image, sliding windows.

One image is one run of placeholders; a crop of pan-and-scan is an image of its own. A token is a square of patches
(4x4): whole squares are judged before the projector. SigLIP has no class token: the attention that a patch receives,
mean over queries, stands in for the class token's. The tokens that are left of an image still see each other both ways.
Positions are renumbered after a cut. Between decoder layers only prompts that fit into the sliding window can be cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapters.rows import RowsAdapter, flat_tower
from vtp_plugin.hosts.transformers.contract import FAMILIES
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Image


class Gemma3(RowsAdapter):
    """transformers' Gemma 3 with images."""

    family = "gemma3"
    touches = FAMILIES["gemma3"]
    models = "Gemma 3"
    names = ("Gemma3ForConditionalGeneration",)
    facts = {"vision_config.model_type": "siglip_vision_model"}
    stages = dict.fromkeys(Stage, "")
    uniform = True

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.tower = flat_tower(self.core.vision_tower, -1, block=self.projector.kernel_size)

    @classmethod
    def tokens_in(cls, config: Mapping[str, Any]) -> int | None:
        return config.get("mm_tokens_per_image")

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        side, values = self.projector.tokens_per_side, inputs["pixel_values"]
        patches = self.tower.grid[0] * self.tower.grid[1]
        return [
            Image(
                total=side**2,
                index=torch.arange(side**2, device=values.device),
                patches=patches,
                projectable=side**2,
                grid=(side, side),
            )
            for _ in values
        ]

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels of all tiles [T, N, C] -> rows per image [n, C]: averages of whole squares."""
        square = maps.unflatten(1, self.tower.grid).permute(0, 3, 1, 2)
        return list(self.projector.avg_pool(square).flatten(2).transpose(1, 2))

    def units(self, entering: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        side, pool = self.projector.tokens_per_side, self.projector.kernel_size
        squares = entering.unflatten(1, (side, pool, side, pool)).transpose(2, 3)  # [T, side, side, pool, pool, C]
        return list(squares.flatten(3).flatten(1, 2))

    def split(self, output: Any, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """[images, n, D] -> [n, D] each."""
        return list(output.pooler_output)

    def pack(self, rows: Sequence[Tensor], kind: str, host: Tensor) -> Tensor:
        """[images, K, D] as in the host, [rows, D] where images keep unequal numbers."""
        even = len({len(image) for image in rows}) == 1
        return torch.stack(list(rows)) if even else torch.cat(list(rows))
