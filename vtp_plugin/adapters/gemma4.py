"""Gemma 4: pictures of any size as patches with places, averaged to tokens inside the tower, sliding and full layers.

One image is one run of placeholders. The host fills its patches up to one number for all images; filled places have the
position -1, see nothing and become no token. A token is the mean of a square of patches (3x3), so whole images enter
the tower, and rows are judged behind the projector, their signals being the mean of their patches'. There is no class
token: the attention that a patch receives from its own image, mean over queries, stands in for the class token's.
Positions are renumbered after a cut.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapter import Tower
from vtp_plugin.adapters.rows import RowsAdapter
from vtp_plugin.contract import TouchPoint
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.compatibility import TRANSFORMERS
from vtp_plugin.hosts.transformers import contract
from vtp_plugin.signals import BlockView
from vtp_plugin.stages import Stage
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.call import Image
from vtp_plugin.surgery.layout import Block, Layout
from vtp_plugin.surgery.rows import RowsLate
from vtp_plugin.surgery.tiles import TiledEarly

PLACES, GRIDS = "image_position_ids", "image_grids"  # across and down, of every patch; columns and rows of every image
POOLED = "its tower averages patches by their places, images of all sizes filled up to one number of patches"
LOGITS = "its host computes the logits of every column that is left, if a prompt becomes shorter between its layers"
VIDEOS = "gemma4: only images are pruned, and this prompt has a video: give its frames as images"


def placed_block(block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockView:
    """A block that turns the patches of every image by their places, called with normed hidden states [T, N, D]."""
    module, places = block.attention, kwargs["position_ids"]
    hidden = args[0] if args else kwargs["hidden_states"]
    turn, heads = sys.modules[type(module).__module__].apply_multidimensional_rope, {}
    for name in ("q_proj", "k_proj"):
        heads[name] = attention.heads(module, name, hidden)  # [T, H, N, d]
    cos, sin = kwargs["position_embeddings"]
    query, key = (turn(one, cos, sin, places, unsqueeze_dim=1) for one in heads.values())
    filled = (places < 0).all(-1)
    return BlockView(
        heads["k_proj"],
        None,
        lambda: attention.received(query, key, attention.scale(module), real=~filled),
        project_values=lambda: attention.heads(module, "v_proj", hidden),
    )


class PlacedEarly(TiledEarly):
    """Whole images enter the tower, as patches."""

    def _tower(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The tower's `forward` on patches [T, N, 3 p^2]."""
        if self.passing is not None and self.vision.pixels is not None:
            colours = pixel_values.unflatten(-1, (-1, 3)).permute(0, 3, 1, 2)  # [T, 3, N, p^2]
            self._identify(self.vision.pixels.images(colours))
        return self.forward(pixel_values, *args, **kwargs)


PLACED = Layout(
    PlacedEarly,
    RowsLate,
    placed_block,
    shape=lambda tower, passing: tuple(passing.values.shape[:2]),
    tile=lambda tower, passing: torch.zeros(passing.values.shape[:2]),
)


class Gemma4(RowsAdapter):
    """transformers' Gemma 4 with images."""

    family = "gemma4"
    touches = (
        *contract.SHARED,
        *contract.prompt(),
        *contract.repeated(),
        TouchPoint(TRANSFORMERS, ".model", "the projector", has=("embed_vision", "language_model")),
        TouchPoint(
            TRANSFORMERS,
            ".model.vision_tower",
            "the vision tower",
            takes=("pixel_values", "pixel_position_ids"),
            has=("patch_embedder", "encoder", "pooler", "config"),
        ),
        TouchPoint(TRANSFORMERS, ".model.vision_tower.pooler", "squares of patches", takes=("hidden_states",)),
        TouchPoint(
            TRANSFORMERS,
            ".model.vision_tower.encoder.layers.0.self_attn",
            "attention rows",
            takes=("hidden_states", "position_embeddings", "position_ids"),
            has=("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "head_dim", "scaling"),
        ),
        TouchPoint(
            TRANSFORMERS,
            ".model.vision_tower@apply_multidimensional_rope",
            "attention rows",
            takes=("x", "cos", "sin", "position_ids", "unsqueeze_dim"),
        ),
        TouchPoint(TRANSFORMERS, ".model.get_image_features", "features of the images", takes=(PLACES,)),
    )
    models = "Gemma 4"
    names = ("Gemma4ForConditionalGeneration",)
    facts = {
        "text_config.hidden_size_per_layer_input": 0,
        "text_config.num_kv_shared_layers": 0,
        "text_config.enable_moe_block": False,
    }
    layout = PLACED
    parts = ("vision_tower.pooler", "language_model")
    stages = {Stage.PIXELS: POOLED, Stage.VIT: POOLED, Stage.PROJECTOR: "", Stage.LLM: LOGITS}

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        vision = self.core.vision_tower
        self.pool = vision.config.pooling_kernel_size
        self.tower = Tower(
            module=vision,
            embeddings=vision.patch_embedder,
            patch_embedding=vision.patch_embedder.input_proj,
            blocks=vision.encoder.layers,
            post_layernorm=None,
            prefix=0,
            grid=(1, 1),  # every image has its own
            patch_size=vision.config.patch_size,
            projected=-1,
            block=self.pool,
        )

    @property
    def projectors(self) -> Sequence[nn.Module]:
        return (self.core.embed_vision,)

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return super().sizes(inputs) | {GRIDS: inputs[PLACES].amax(1) + 1}

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        if inputs.get("pixel_values_videos") is not None:
            raise PruningError(VIDEOS)
        found, values = [], inputs["pixel_values"]
        for rows, columns in self._grids(inputs):
            total = rows * columns
            index = torch.arange(total, device=values.device)
            facts = {"patches": values.shape[1], "projectable": total, "grid": (rows, columns)}
            found.append(Image(total=total, index=index, **facts))
        return found

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels of all patches [T, N, C] -> rows per image [n, C]: averages of whole squares."""
        return [rows.unflatten(-1, (-1, maps.shape[-1])).mean(-2) for rows in self.units(maps, kind, inputs)]

    def units(self, entering: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """[T, N, D] -> what is averaged per image, [n, m D]."""
        pool, found = self.pool, []
        for image, (rows, columns) in zip(entering, self._grids(inputs), strict=True):
            squares = image[: rows * columns * pool**2].unflatten(0, (rows, pool, columns, pool)).transpose(1, 2)
            found.append(squares.flatten(2).flatten(0, 1))
        return found

    def pooling_macs(self, tokens: int) -> int:
        return tokens * (tokens // self.pool**2) * self.core.vision_tower.config.hidden_size

    def _grids(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of every image's tokens."""
        known = inputs if GRIDS in inputs else self.sizes(inputs)  # by hand, nothing was read with the prompt
        return [(down // self.pool, across // self.pool) for across, down in known[GRIDS].tolist()]
