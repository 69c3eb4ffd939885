"""LLaVA-1.6 in the authors' package (`llava-torch`): tiles of any resolution, unpadded, with newline rows.

The package packs tiles inside its merge of text and features. The merge is run once on prompts of one placeholder each
to learn what it makes of the tiles (signals travel through it as channels, newlines as nan), and once more with the
rows that are left, so its geometry is never computed twice. Newline rows are always kept and count in no budget;
`budget` is per_image by default, per_tile or total. Inside the tower every tile is judged by itself. Positions are
renumbered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapters.llava import Llava
from vtp_plugin.adapters.llava_prompt import PLACEHOLDER
from vtp_plugin.hosts.llava import contract
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Call, Image
from vtp_plugin.surgery.columns import Rows
from vtp_plugin.surgery.tiles import TILED
from vtp_plugin.surgery.undo import Undo


class LlavaAnyres(Llava):
    """The authors' LLaVA-1.6."""

    family = "llava_anyres"
    touches = contract.ANYRES
    models = "LLaVA-1.6 (llava-torch)"
    names = ()  # those of LLaVA-1.5: one of the two speaks for them
    stages = dict.fromkeys(Stage, "")
    uniform = False
    layout = TILED
    tiled = True
    tokenwise = True
    several_views = True

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return Llava.matches(model) and getattr(model.config, "image_aspect_ratio", "") == "anyres"

    @property
    def uneven(self) -> bool:
        return True  # tiles are unpadded: every image has a number of its own

    def _merged(self, call: Call, prompts: Sequence[Tensor], text: Any, images: Any, sizes: Any) -> tuple[Any, ...]:
        """The host's merge with the rows of every image [n, D] that are left; sets the images."""
        tiles = [image if image.ndim == 4 else image[None] for image in images]
        pairs = self._cut(call, prompts, {"tiles": tiles, "image_sizes": sizes})
        for image, (_, kept) in zip(call.images, pairs, strict=True):
            image.source, image.judged, image.fixed = kept.source, kept.judged, kept.fixed
        blank = torch.zeros(len(tiles), 3, 1, 1, device=text[0].device)  # one image each: no packing again
        return self._merged_with([rows for rows, _ in pairs], *text, blank, sizes)

    def _sources(self, call: Call) -> list[Tensor]:
        """Per image [n] long, which of the rows that the host makes each of its rows stands for."""
        return [image.source for image in call.images]

    def _cut(self, call: Call, prompts: Sequence[Tensor], inputs: Mapping[str, Any]) -> list[tuple[Tensor, Rows]]:
        """Encode all tiles, pack them as the host does, and take rows out."""
        tiles, everything = inputs["tiles"], list(range(len(inputs["tiles"])))
        call.images = self._images(prompts, tiles)
        for image, size in zip(call.images, inputs["image_sizes"] or (), strict=False):
            image.views = self._views(size) if image.tiles > 1 else None
        owners = [number for number in everything for _ in tiles[number]]
        with call.in_tower(everything, owners=owners, inputs=inputs):
            rows = self.arrange(self.encode(torch.cat(list(tiles))), "image", inputs)
            for image, one in zip(call.images, rows, strict=True):
                image.total, image.index = len(one), torch.arange(len(one), device=one.device)
            newline = getattr(self.language_model, "image_newline", None)
            features = [one if newline is None else torch.where(one.isnan(), newline.to(one), one) for one in rows]
            return self.pruned.vision.rows(features)

    def _images(self, prompts: Sequence[Tensor], tiles: Sequence[Tensor]) -> list[Image]:
        """The images before they are packed, [T, 3, H, W] each: what the host makes of them is not known yet."""
        questions, patches = self._questions(prompts), self.tower.grid[0] * self.tower.grid[1]
        return [
            Image(
                total=0,
                index=prompts[0][:0],
                sample=row,
                question=questions[row],
                tiles=len(image),
                patches=len(image) * patches,
                projectable=len(image) * patches,
            )
            for row, image in zip(self._owners(prompts, len(tiles)), tiles, strict=True)
        ]

    def _views(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the crops of an image of this size (width, height), as the host lays them out."""
        from llava.mm_utils import get_anyres_image_grid_shape

        side = self.model.get_vision_tower().config.image_size
        columns, rows = get_anyres_image_grid_shape(size, self.model.config.image_grid_pinpoints, side)
        return rows, columns

    # -- the host's packing ---------------------------------------------------------------------------------------

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels [T, N, C] through the host's merge, as wide as its embeddings at a time."""
        width, maps = self.model.config.hidden_size, maps.to(self.pruned.device)  # beside the embeddings of its text
        parts = [self._packed(chunk, width, inputs) for chunk in maps.split(width, dim=-1)]
        sizes = [min(width, maps.shape[-1] - start) for start in range(0, maps.shape[-1], width)]
        cut = [[rows[:, :size] for rows in part] for part, size in zip(parts, sizes, strict=True)]
        return [torch.cat(pieces, dim=-1) for pieces in zip(*cut, strict=True)]

    def _packed(self, maps: Tensor, width: int, inputs: Mapping[str, Any]) -> list[Tensor]:
        """At most `width` channels [T, N, C] through the host's packing: per image [n, width], newlines nan."""
        maps = torch.nn.functional.pad(maps, (0, width - maps.shape[-1]))
        ids = torch.full((len(inputs["tiles"]), 1), PLACEHOLDER, device=maps.device)
        ids = torch.cat([ids, ids.new_zeros(len(ids), 1)], dim=1)  # one id more: a single one means decoding
        ones = torch.ones_like(ids, dtype=torch.bool)
        with Undo() as undo:
            if hasattr(self.language_model, "image_newline"):
                newline = maps.new_full((width,), float("nan"))
                undo.override(self.language_model, "image_newline", newline)
            if self._longest is not None:
                undo.override(self.model.config, "tokenizer_model_max_length", None)
            sizes = inputs["image_sizes"]
            merged = self._merged_with(maps, ids, None, ones, None, None, list(inputs["tiles"]), sizes)
        return [rows[mask][:-1] for rows, mask in zip(merged[4], merged[2], strict=True)]

    def _merged_with(self, features: Any, *args: Any) -> tuple[Any, ...]:
        """The host's merge, with these features in place of encoded images."""
        with Undo() as undo:
            undo.override(self.model, "encode_images", lambda images: features)
            return self.merge(*args)
