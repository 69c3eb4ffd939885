"""LLaVA-OneVision in transformers: SigLIP tower, tiles of any resolution, video, MLP projector, Qwen2.

Images are packed as in LLaVA-NeXT (newline rows are always kept and count in no budget; `budget=per_image` by default),
each image of a prompt with several is one tile; a video is one image whose tiles are its frames, pooled by the host.
SigLIP has no class token: the attention that a patch receives, mean over queries, stands in for the class token's.
Where the host interpolates (very large images, videos), rows are mixtures of patches: there the projector stage judges
and merges the projected rows, the llm stage works, the pixels and vit stages are refused when the image arrives.
Positions are renumbered after a cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapters import v5_17
from vtp_plugin.adapters.rows import RowsAdapter, flat_tower
from vtp_plugin.hosts.transformers.contract import FAMILIES
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Image


class LlavaOnevision(RowsAdapter):
    """transformers' LLaVA-OneVision."""

    family = "llava_onevision"
    touches = FAMILIES["llava_onevision"]
    models = "LLaVA-OneVision (transformers)"
    names = ("LlavaOnevisionForConditionalGeneration",)
    facts = {
        "vision_config.model_type": "siglip_vision_model",
        "vision_feature_layer": int,
        "vision_feature_select_strategy": "full",
    }
    stages = dict.fromkeys(Stage, "")
    videos = True
    tokenwise = True
    several_views = True

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.tower = flat_tower(self.core.vision_tower, model.config.vision_feature_layer)

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        found, patches = [], self.tower.grid[0] * self.tower.grid[1]
        if inputs.get("pixel_values") is not None:
            tiles = self._tiles(inputs)
            packed = self._packed(torch.zeros(sum(tiles), patches, 1), inputs)
            made = zip(tiles, packed, self._views(inputs, tiles), strict=True)
            device = inputs["pixel_values"].device
            found += [replace(self._image("image", len(rows), n, device), views=views) for n, rows, views in made]
        if inputs.get("pixel_values_videos") is not None:
            videos = inputs["pixel_values_videos"]
            film = videos.shape[1], -(-self.tower.grid[0] // 2), -(-self.tower.grid[1] // 2)
            one = partial(self._image, "video", prod(film) + 1, videos.shape[1], videos.device)
            found += [replace(one(), film=film) for _ in videos]
        return found

    def _image(self, kind: str, total: int, tiles: int, device: torch.device) -> Image:
        patches = tiles * self.tower.grid[0] * self.tower.grid[1]
        index = torch.arange(total, device=device)
        token = self.model.config.video_token_id if kind == "video" else self.image_token
        return Image(
            total=total, index=index, kind=kind, token=token, tiles=tiles, patches=patches, projectable=patches
        )

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels of all tiles [T, N, C] -> rows per image [n, C]; newlines are nan."""
        if kind == "image":
            return self._packed(maps, inputs)
        rows = self.core.apply_pooling(maps).unflatten(0, inputs["pixel_values_videos"].shape[:2]).flatten(1, 2)
        return list(torch.nn.functional.pad(rows, (0, 0, 0, 1), value=float("nan")))

    def split(self, output: Any, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """[n, D] per image, a video's newline included."""
        if kind == "video" and v5_17.is_host():  # which appends the newline later
            return [torch.cat([rows, self.core.image_newline[None].to(rows)]) for rows in output.pooler_output]
        return list(output.pooler_output)

    def pack(self, rows: Sequence[Tensor], kind: str, host: Any) -> Any:
        """[n, D] per image in a list; of videos [videos, n, D], or [1, rows, D] where they keep unequal numbers."""
        if kind == "image":
            return list(rows)
        if v5_17.is_host():
            return torch.cat(list(rows))[None, :-1]
        even = len({len(video) for video in rows}) == 1
        return torch.stack(list(rows)) if even else torch.cat(list(rows))[None]

    def _packed(self, maps: Tensor, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels [T, N, C] through the host's packing, newline rows nan."""
        newline = maps.new_full(maps.shape[-1:], float("nan"))
        ratio = inputs.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        tiles = maps.split(self._tiles(inputs))
        return self.core.pack_image_features(
            tiles, inputs["image_sizes"], image_newline=newline, vision_aspect_ratio=ratio
        )[0]

    def _tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        """How many tiles every image has, base included; one where a prompt has several images."""
        from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

        config, sizes, numbers = self.model.config, inputs["image_sizes"], inputs.get("batch_num_images")
        side = config.vision_config.image_size
        alone = [True] * len(sizes) if numbers is None else [n == 1 for n in numbers for _ in range(n)]
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, side) if single else 1
            for size, single in zip(sizes, alone, strict=True)
        ]

    def _views(self, inputs: Mapping[str, Any], tiles: Sequence[int]) -> list[tuple[int, int] | None]:
        """Rows and columns of every image's crops, as the host lays them out; None for an image of one tile."""
        from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape

        config = self.model.config
        side, points = config.vision_config.image_size, config.image_grid_pinpoints
        return [
            get_anyres_image_grid_shape(size, points, side) if n > 1 else None
            for size, n in zip(inputs["image_sizes"], tiles, strict=True)
        ]
