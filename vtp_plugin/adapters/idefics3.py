"""Idefics3 and SmolVLM: SigLIP-like tower, pixel shuffle, linear connector, text between the tiles of an image.

One image is one tile: the prompt says its row and column between two tiles, so tiles are not told apart from images,
and `budget=per_image` counts per tile. Rows are judged behind the connector, their signals are the mean of their
patches'. The tower has no class token: the attention that a patch receives, mean over queries, stands in for the class
token's. Positions are renumbered after a cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapters.rows import RowsAdapter, flat_tower, runs
from vtp_plugin.contract import release
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.transformers.contract import FAMILIES
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Image
from vtp_plugin.surgery.undo import Undo

TILES = "vtp_tiles"  # no argument of the host
BLOCKS = (5, 20)  # the transformers whose SmolVLM places rows in blocks of `patch_size`, of which a cut leaves parts
MASKED = "the tower masks its attention by the full patch grid of every tile"


class Idefics3(RowsAdapter):
    """transformers' Idefics3 and SmolVLM."""

    family = "idefics3"
    touches = FAMILIES["idefics3"]
    models = "Idefics3, SmolVLM"
    names = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
    parts = ("connector", "text_model")
    overview = -1
    stages = {Stage.PIXELS: MASKED, Stage.VIT: MASKED, Stage.PROJECTOR: "", Stage.LLM: ""}

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.tower = flat_tower(self.core.vision_model, -1)
        self.scale = model.config.scale_factor

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        values, patches = inputs["pixel_values"], self.tower.grid[0] * self.tower.grid[1]
        rows = patches // self.scale**2
        known = inputs if TILES in inputs else self.sizes(inputs)  # by hand, nothing was read with the prompt
        tiles, found = int(known[TILES].sum()), runs(inputs["input_ids"], self.image_token)
        if sum(found) != rows * tiles or any(run % rows for run in found):
            raise PruningError(f"the prompt has {sum(found)} image placeholders, its images make {tiles * rows} tokens")
        side = self.tower.grid[1] // self.scale
        index = torch.arange(rows, device=values.device)
        return [
            Image(total=rows, index=index.clone(), patches=patches, projectable=rows, grid=(side, side))
            for _ in range(tiles)  # also where no text stands between two of them
        ]

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tiles of every sample, too; a tile of zeros is padding."""
        return super().sizes(inputs) | {TILES: inputs["pixel_values"].flatten(2).any(-1).sum(1)}

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels of all tiles [T, N, C] -> rows per tile [n, C]: means over the squares of the pixel shuffle."""
        rows = self.projector.pixel_shuffle(maps, self.scale)
        return list(rows.unflatten(-1, (-1, maps.shape[-1])).mean(-2))

    def units(self, entering: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """[T, N, D] -> what goes into the projector per tile, [n, m D]."""
        return list(self.projector.pixel_shuffle(entering, self.scale))

    def pack(self, rows: Sequence[Tensor], kind: str, host: Any) -> Any:
        """The rows of all tiles of a sample together, [K, D] each; up to transformers 5.19 in blocks of one row."""
        if isinstance(host, Tensor):
            return torch.cat(list(rows))[:, None]
        tiles, left = self.served[kind][1], iter(rows)
        copies = len(rows) // max(1, len(tiles))
        samples = range(max([len(host), *(sample + 1 for sample in tiles)]))
        counts = [tiles.count(sample) for sample in samples for _ in range(copies)]
        return [torch.cat([rows[0][:0], *islice(left, count)]) for count in counts]

    @contextmanager
    def serving(self, features: Any) -> Iterator[None]:
        with super().serving(features), Undo() as undo:
            if features and self.core.config.model_type == "smolvlm" and release("transformers")[:2] == BLOCKS:
                undo.override(self.core, "inputs_merger", self._merged)
            yield

    def _merged(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_hidden_states: Tensor) -> Tensor:
        """The rows of all tiles [K, D] in their placeholders, in turn."""
        if input_ids is None:
            token = torch.tensor(self.image_token, device=inputs_embeds.device)
            there = (inputs_embeds == self.core.get_input_embeddings()(token)).all(-1)
        else:
            there = input_ids == self.image_token
        return inputs_embeds.masked_scatter(there[..., None], image_hidden_states.to(inputs_embeds))

    def split(self, output: Any, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """The rows of all tiles of a sample, [K, D] each -> [n, D] per tile."""
        rows = self.tower.grid[0] * self.tower.grid[1] // self.scale**2
        return torch.cat(list(output.pooler_output)).split(rows)
