"""InternVL in transformers: InternViT tower, tiles with pixel shuffle, MLP projector, Qwen or LLaMA.

One image is an unbroken run of placeholders, which is all the tiles between its begin and end marks; a video frame is
one image. A token is a square of patches (2x2): whole squares are judged before the projector, a square's embedding is
the concatenation of its patches, its signals are their mean; there is no class feature in the space of squares. The
tower has a class token. `budget`: per_image (default), per_tile, total. Positions are renumbered after a cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapter import Tower
from vtp_plugin.adapters.rows import RowsAdapter, runs
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.transformers.contract import FAMILIES
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Image


def tower_of(vision: nn.Module, config: Any) -> Tower:
    """Where the tower of an InternVL with this configuration has its parts, in transformers and inside vLLM."""
    sizes = config.vision_config
    return Tower(
        module=vision,
        embeddings=vision.embeddings,
        patch_embedding=vision.embeddings.patch_embeddings.projection,
        blocks=vision.encoder.layer,
        post_layernorm=vision.layernorm,
        prefix=1,
        grid=tuple(side // patch for side, patch in zip(sizes.image_size, sizes.patch_size, strict=True)),
        patch_size=sizes.patch_size[0],
        projected=-1,
        attention="attention",
        block=round(1 / config.downsample_ratio),
    )


class InternVL(RowsAdapter):
    """transformers' InternVL."""

    family = "internvl"
    touches = FAMILIES["internvl"]
    models = "InternVL (transformers)"
    names = ("InternVLForConditionalGeneration",)
    facts = {
        "vision_config.model_type": "internvl_vision",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
    overview = -1
    stages = dict.fromkeys(Stage, "")

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.tower = tower_of(self.core.vision_tower, model.config)

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        """Runs of placeholders are images; the tower gives every tile equally many."""
        values, patches = inputs["pixel_values"], self.tower.grid[0] * self.tower.grid[1]
        rows = patches // self.tower.block**2
        totals = runs(inputs["input_ids"], self.image_token)
        if sum(totals) != len(values) * rows or any(total % rows for total in totals):
            raise PruningError(
                f"the prompt has {sum(totals)} image placeholders, its images make {len(values) * rows} tokens"
            )
        return [
            Image(
                total=total,
                index=torch.arange(total, device=values.device),
                tiles=total // rows,
                patches=total // rows * patches,
                projectable=total,
                grid=(total // self._side, self._side),
            )
            for total in totals
        ]

    @property
    def _side(self) -> int:
        return self.tower.grid[1] // self.tower.block

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        square = maps.unflatten(1, self.tower.grid)
        shuffled = self.core.pixel_shuffle(square, scale_factor=self.model.config.downsample_ratio)
        rows = shuffled.flatten(1, 2).unflatten(-1, (-1, maps.shape[-1])).mean(-2)  # [T, n, C]
        return self._by_image(rows, inputs)

    def units(self, entering: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """[T, n, m D], behind the pixel shuffle -> per image [tiles n, m D]."""
        return self._by_image(entering, inputs)  # behind the pixel shuffle

    def split(self, output: Any, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """[T, n, D] -> [tiles n, D] per image."""
        return self._by_image(output.pooler_output, inputs)

    def _by_image(self, rows: Tensor, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Rows of all tiles [T, n, C] -> [tiles n, C] per image."""
        return rows.flatten(0, 1).split(runs(inputs["input_ids"], self.image_token))

    def pack(self, rows: Sequence[Tensor], kind: str, host: Tensor) -> Tensor:
        """[tiles, N, D] as in the host, [rows, D] where something was dropped: tiles keep unequal numbers."""
        flat = torch.cat(list(rows))
        whole = host.ndim == 3 and len(flat) % (host.shape[0] * host.shape[1]) == 0
        return flat.view(-1, *host.shape[1:]) if whole and len(flat) else flat
