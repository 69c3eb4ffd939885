"""LLaVA-NeXT (1.6) in transformers: CLIP tower, tiles of any resolution, MLP projector, LLaMA or Mistral.

One image is a base tile and a grid of crops; the host puts the crops together, cuts the padding away and ends every row
with a newline. Newline rows are always kept and count in no budget. `budget` says what keep_ratio and keep_tokens count
over: per_image (the default: base and crops together), per_tile, or total (all images of a prompt). Inside the tower
(pixels and vit) every tile is judged by itself. Positions are renumbered after a cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapter import SharedSpace
from vtp_plugin.adapters.clip import clip_tower, space_of
from vtp_plugin.adapters.rows import RowsAdapter
from vtp_plugin.hosts.transformers.contract import FAMILIES
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Image


class LlavaNext(RowsAdapter):
    """transformers' LLaVA-NeXT."""

    family = "llava_next"
    touches = FAMILIES["llava_next"]
    models = "LLaVA-NeXT (transformers)"
    names = ("LlavaNextForConditionalGeneration",)
    facts = {
        "vision_config.model_type": "clip_vision_model",
        "vision_feature_layer": int,
        "vision_feature_select_strategy": "default",
    }
    stages = dict.fromkeys(Stage, "")
    tokenwise = True
    several_views = True

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.tower = clip_tower(self.core.vision_tower, model.config.vision_feature_layer)

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        tiles = self._tiles(inputs)
        patches = self.tower.grid[0] * self.tower.grid[1]
        packed = self._packed(torch.zeros(sum(tiles), patches, 1), inputs)
        return [
            Image(
                total=len(rows),
                index=torch.arange(len(rows), device=inputs["pixel_values"].device),
                tiles=n,
                patches=n * patches,
                projectable=n * patches,
                views=views,
            )
            for n, rows, views in zip(tiles, packed, self._views(inputs), strict=True)
        ]

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels of all tiles [T, N, C] -> rows per image [n, C], newline rows nan."""
        return self._packed(maps, inputs)

    def _packed(self, maps: Tensor, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels [T, N, C] through the host's packing, newline rows nan."""
        newline = maps.new_full(maps.shape[-1:], float("nan"))
        tiles = maps.split(self._tiles(inputs))
        return self.core.pack_image_features(tiles, inputs["image_sizes"], "default", image_newline=newline)[0]

    def _tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        """How many tiles every image has, base included, as the host counts them."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.model.config
        side = config.vision_config.image_size
        return [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in inputs["image_sizes"]]

    def _views(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of every image's crops, as the host lays them out."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        config = self.model.config
        side = config.vision_config.image_size
        return [get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side) for size in inputs["image_sizes"]]

    def shared_space(self, checkpoint: str | None) -> SharedSpace:
        return space_of(self.model, self.tower, checkpoint)
