"""LLaVA-NeXT-Video in transformers: images as in LLaVA-NeXT; a video is one image whose tiles are its frames.

The host averages squares of patches of every frame and projects the means: rows of a video are judged and merged as
projected rows, or judged as the patches that are averaged (`judge=before`); the llm stage works, the pixels and vit
stages are refused when a video arrives. A token of a picture is one patch, which is what goes into the projector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapters.llava_next import LlavaNext
from vtp_plugin.contract import TouchPoint
from vtp_plugin.hosts.compatibility import TRANSFORMERS
from vtp_plugin.hosts.transformers.contract import FAMILIES
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Image
from vtp_plugin.surgery.layout import Layout
from vtp_plugin.surgery.rows import RowsLate
from vtp_plugin.surgery.tiles import TiledEarly
from vtp_plugin.surgery.undo import Undo


class FramesLate(RowsLate):
    """Cuts of the projector stage. What is merged into a video's rows enters the pooling in front of the projector."""

    def install(self, undo: Undo) -> None:
        super().install(undo)
        if self.vision.at(Stage.PROJECTOR):
            undo.before(self.family.core.vision_resampler, self._pooling)

    def _pooling(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep the patches of all frames; signals are pooled later in the pass."""
        if self.passing is not None and self.passing.features is None:
            super()._projecting(module, args, kwargs)

    def _projecting(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.passing is not None and self.passing.kind == "image":
            super()._projecting(module, args, kwargs)


class LlavaNextVideo(LlavaNext):
    """transformers' LLaVA-NeXT-Video."""

    family = "llava_next_video"
    touches = (
        *FAMILIES["llava_next"],
        TouchPoint(TRANSFORMERS, ".model.vision_resampler", "rows of a video", takes=("image_features",)),
        TouchPoint(
            TRANSFORMERS, ".model.get_video_features", "rows of a video", takes=("pixel_values_videos|pixel_values",)
        ),
    )
    models = "LLaVA-NeXT-Video (transformers)"
    names = ("LlavaNextVideoForConditionalGeneration",)
    layout = Layout(TiledEarly, FramesLate)
    videos = True
    facts = {**LlavaNext.facts, "spatial_pool_mode": "average"}

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        found = super().images(inputs) if inputs.get("pixel_values") is not None else []
        videos = inputs.get("pixel_values_videos")
        return found + [self._video(len(video), video.device) for video in (() if videos is None else videos)]

    def _video(self, frames: int, device: torch.device) -> Image:
        (rows, columns), stride = self.tower.grid, self.model.config.spatial_pool_stride
        film = frames, rows // stride, columns // stride
        total, patches = prod(film), frames * rows * columns
        return Image(
            total=total,
            index=torch.arange(total, device=device),
            kind="video",
            token=self.model.config.video_token_id,
            tiles=frames,
            patches=patches,
            projectable=total,
            film=film,
        )

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        if kind == "image":
            return super().arrange(maps, kind, inputs)
        rows = self.core.vision_resampler(maps)  # [T, n, C]
        return list(rows.unflatten(0, inputs["pixel_values_videos"].shape[:2]).flatten(1, 2))

    def units(self, entering: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """[frames, N, D] -> what is averaged per video, [n, m D]; a picture's rows are patches, newlines nan."""
        if kind == "image":
            return self.arrange(entering, kind, inputs)
        (rows, columns), pool = self.tower.grid, self.model.config.spatial_pool_stride
        down, across = rows // pool, columns // pool  # the host leaves over what is no whole square
        whole = entering.unflatten(1, (rows, columns))[:, : down * pool, : across * pool]
        squares = whole.unflatten(1, (down, pool)).unflatten(3, (across, pool)).transpose(2, 3)
        units = squares.flatten(3).flatten(1, 2)  # [frames, n, m D]
        return list(units.unflatten(0, inputs["pixel_values_videos"].shape[:2]).flatten(1, 2))

    def split(self, output: Any, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Rows per image; transformers 5.17 keeps the frames of a video apart, [frames, n, D]."""
        return [rows.flatten(0, -2) for rows in super().split(output, kind, inputs)]

    def pack(self, rows: Sequence[Tensor], kind: str, host: Any) -> Any:
        """[videos, K, D] as in the host, [K, D] each where videos keep unequal numbers; in 5.17 as of one frame."""
        if kind == "image":
            return super().pack(rows, kind, host)
        if not isinstance(host, Tensor) and host[0].ndim == 3:
            return [video[None] for video in rows]
        return torch.stack(list(rows)) if len({len(video) for video in rows}) == 1 else list(rows)
