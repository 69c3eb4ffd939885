"""Aya Vision and Command A Vision: SigLIP tower, pixel shuffle, Cohere 2 with layers that slide and layers that do not.

One image is one tile: the prompt names every tile, so tiles are not told apart from images, and `budget=per_image`
counts per tile. A token is a square of patches (2x2): whole squares are judged before the projector. SigLIP has no
class token: the attention that a patch receives, mean over queries, stands in for the class token's. Layers with full
attention rotate nothing. Positions are renumbered after a cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapters.rows import RowsAdapter, flat_tower, pooled_macs
from vtp_plugin.contract import TouchPoint
from vtp_plugin.hosts.compatibility import TRANSFORMERS
from vtp_plugin.hosts.transformers import contract
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Image


class AyaVision(RowsAdapter):
    """transformers' Aya Vision."""

    family = "aya_vision"
    touches = (
        *contract.SHARED,
        *contract.prompt(),
        *contract.repeated(),
        *contract.decoder(contract.LANGUAGE, window=True, numbered=False),
        *contract.clip(contract.TOWER),
        TouchPoint(TRANSFORMERS, ".model.multi_modal_projector.pixel_shuffle", "squares", takes=("image_features",)),
    )
    models = "Aya Vision"
    names = ("AyaVisionForConditionalGeneration",)
    facts = {
        "vision_config.model_type": "siglip_vision_model",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config.model_type": "cohere2",
    }
    stages = dict.fromkeys(Stage, "")
    overview = -1

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.tower = flat_tower(self.core.vision_tower, -1, block=model.config.downsample_factor)

    def turns(self, attention: nn.Module) -> bool:
        return attention.sliding_window is not None

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        values, (rows, columns) = inputs["pixel_values"], (side // self.tower.block for side in self.tower.grid)
        total, patches = rows * columns, self.tower.grid[0] * self.tower.grid[1]
        index = torch.arange(total, device=values.device)
        return [
            Image(total=total, index=index.clone(), patches=patches, projectable=total, grid=(rows, columns))
            for _ in values
        ]

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels of all tiles [T, N, C] -> rows per image [n, C]: the mean over the squares of the pixel shuffle."""
        return [rows.unflatten(-1, (-1, maps.shape[-1])).mean(-2) for rows in self.units(maps, kind, inputs)]

    def units(self, entering: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """[T, N, D] -> what goes into the projector per image, [n, m D]."""
        return list(self.projector.pixel_shuffle(entering).flatten(1, 2))

    def pack(self, rows: Sequence[Tensor], kind: str, host: Tensor) -> Tensor:
        """[tiles, K, D] as in the host, [rows, D] where tiles keep unequal numbers."""
        even = len({len(tile) for tile in rows}) == 1
        return torch.stack(list(rows)) if even else torch.cat(list(rows))

    def pooling_macs(self, tokens: int) -> int:
        return pooled_macs(self.core.vision_tower, tokens)
