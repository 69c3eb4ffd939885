"""Mistral 3 (Mistral Small 3.1 and later): Pixtral tower, 2x2 patch merger, a break token behind every row of an image.

One image is the grid of its merged tokens; break tokens are text and always stay. Rows are judged behind the merger,
their signals are the mean of their patches'. Pixtral has no class token: the attention that a patch receives from its
own image, mean over queries, stands in for the class token's. Positions are renumbered after a cut.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from vtp_plugin.adapter import Tower
from vtp_plugin.adapters.rows import RowsAdapter
from vtp_plugin.stages import Stage
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.call import Image
from vtp_plugin.surgery.tiles import TileCuts

if TYPE_CHECKING:
    from vtp_plugin.pruning import Pruned

PACKED = "Pixtral masks and rotates the patches of all images by their full grids"


class Mistral3(RowsAdapter):
    """transformers' Mistral 3 with images."""

    family = "mistral3"
    models = "Mistral 3"
    names = ("Mistral3ForConditionalGeneration",)
    facts = {"vision_config.model_type": "pixtral", "vision_feature_layer": int}
    stages = {Stage.PIXELS: PACKED, Stage.VIT: PACKED, Stage.PROJECTOR: "", Stage.LLM: ""}

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        vision = self.core.vision_tower
        layer = model.config.vision_feature_layer
        self.tower = Tower(
            module=vision,
            embeddings=vision.patch_conv,
            patch_embedding=vision.patch_conv,
            blocks=vision.transformer.layers,
            post_layernorm=None,
            prefix=0,
            grid=(1, 1),  # every image has its own
            patch_size=vision.patch_size,
            projected=layer if layer < 0 else layer - 1,
            attention="attention",
        )
        self.merge = model.config.spatial_merge_size

    def vision(self, pruned: Pruned) -> TileCuts:
        self.cuts = PixtralCuts(pruned, self)
        return self.cuts

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        found = []
        for rows, columns in self.grids(inputs):
            total = (rows // self.merge) * (columns // self.merge)
            index = torch.arange(total, device=inputs["pixel_values"].device)
            grid = (rows // self.merge, columns // self.merge)
            found.append(Image(total=total, index=index, patches=rows * columns, projectable=total, grid=grid))
        return found

    def grids(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of every image's patches."""
        sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
        return [(height // self.tower.patch_size, width // self.tower.patch_size) for height, width in sizes]

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        grids = self.grids(inputs)
        images = maps.split([rows * columns for rows, columns in grids])
        squares = [image.unflatten(0, grid).permute(2, 0, 1) for image, grid in zip(images, grids, strict=True)]
        return [avg_pool2d(square, self.merge).flatten(1).T for square in squares]


class PixtralCuts(TileCuts):
    """The cuts behind a tower that takes the patches of all images in one sequence, [1, S, D]."""

    def rows(self, features: Sequence[Tensor], kind: str, inputs: Mapping[str, Any]) -> list[Any]:
        self.lengths = [rows * columns for rows, columns in self.family.grids(inputs)]
        return super().rows(features, kind, inputs)

    def _row_reader(self, layer: int) -> Callable[..., None]:
        def read(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._active:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            lengths = [self._call.images[number].patches for number in self._call.batch]
            rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
            with torch.no_grad(), self.pruned.timed("selector"):
                query, key = (attention.heads(module, name, hidden) for name in ("q_proj", "k_proj"))  # [1, H, S, d]
                self._call.scratch["keys", layer] = key[0].float().mean(0)
                query, key = rotate(query, key, *kwargs["position_embeddings"], unsqueeze_dim=0)
                spans = zip(query.split(lengths, 2), key.split(lengths, 2), strict=True)
                rows = [attention.received(q, k, attention.scale(module))[0] for q, k in spans]
            self._call.scratch["cls_attention", layer] = torch.cat(rows)

        return read

    def _tiles(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(tuple(shape))

    @property
    def _map_shape(self) -> tuple[int, ...]:
        return (sum(self.lengths),)
