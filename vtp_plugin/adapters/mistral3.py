"""Mistral 3 (Mistral Small 3.1 and later): Pixtral tower, 2x2 patch merger, a break token behind every row of an image.

One image is the grid of its merged tokens; break tokens are text and always stay. Rows are judged behind the merger,
their signals are the mean of their patches'. Pixtral has no class token: the attention that a patch receives from its
own image, mean over queries, stands in for the class token's. Positions are renumbered after a cut.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from vtp_plugin.adapter import Tower
from vtp_plugin.adapters.rows import RowsAdapter
from vtp_plugin.hosts.transformers.contract import FAMILIES
from vtp_plugin.signals import BlockView
from vtp_plugin.stages import Stage
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.call import Image
from vtp_plugin.surgery.layout import Block, Layout, sequences_view
from vtp_plugin.surgery.rows import RowsLate
from vtp_plugin.surgery.tiles import TiledEarly

PACKED = "Pixtral masks and rotates the patches of all images by their full grids"


def pixtral_block(block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockView:
    """A block that takes the patches of all images in one sequence, called with normed hidden states [1, S, D]."""
    module = block.attention
    hidden = args[0] if args else kwargs["hidden_states"]
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    query, keys = (attention.heads(module, name, hidden) for name in ("q_proj", "k_proj"))  # [1, H, S, d]
    turned = rotate(query, keys, *kwargs["position_embeddings"], unsqueeze_dim=0)
    return sequences_view(
        turned[0][0],
        turned[1][0],
        keys[0],
        block.passing.lengths,
        attention.scale(module),
        equal=False,
        values=lambda: attention.heads(module, "v_proj", hidden)[0],
    )


PIXTRAL = Layout(
    TiledEarly,
    RowsLate,
    pixtral_block,
    shape=lambda tower, passing: (sum(passing.lengths),),
    tile=lambda tower, passing: torch.zeros(sum(passing.lengths)),
)


class Mistral3(RowsAdapter):
    """transformers' Mistral 3 with images."""

    family = "mistral3"
    touches = FAMILIES["mistral3"]
    models = "Mistral 3"
    layout = PIXTRAL
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
        """Channels of all patches [S, C] -> rows per image [n, C]: averages of whole squares."""
        grids = self.grids(inputs)
        images = maps.split([rows * columns for rows, columns in grids])
        squares = [image.unflatten(0, grid).permute(2, 0, 1) for image, grid in zip(images, grids, strict=True)]
        return [avg_pool2d(square, self.merge).flatten(1).T for square in squares]

    def units(self, entering: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """[S, D] -> what goes into the merger per image, [n, m D]."""
        m, found, grids = self.merge, [], self.grids(inputs)
        images = entering.split([rows * columns for rows, columns in grids])
        for image, (rows, columns) in zip(images, grids, strict=True):
            squares = image.unflatten(0, (rows // m, m, columns // m, m)).transpose(1, 2)
            found.append(squares.flatten(2).flatten(0, 1))
        return found
