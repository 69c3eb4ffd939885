"""What the Qwen families share: packed tower, square merge units, multi-axis positions. No family itself.

Before the merger, whole merge units (2x2 patches) are judged: a unit's embedding is the concatenation of its patches,
its pixels are one larger patch, its signals the mean of its patches'. There is no class token: the attention that a
patch receives, mean over the queries of its window or frame, stands in for the class token's. Kept tokens keep the
positions that the host computes for the full prompt. A video is one image of several frames; `budget=per_tile` counts
per frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapters.qwen_tower import PACKED, function_of, packed_tower
from vtp_plugin.adapters.rows import VALUES, RowsAdapter
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.binding import signature_of
from vtp_plugin.surgery.call import Image

GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


class Axes:
    """Positions on several axes, which the host computes for the full prompt: those that are left keep theirs."""

    core: nn.Module
    default_positions = "original"
    carried = ("rope_deltas",)  # what the host keeps on its backbone between the passes over one prompt

    def axes(self, inputs: Mapping[str, Any], ids: Tensor, real: Tensor) -> Tensor:
        """Positions [3, B, L] of the whole prompt ids [B, L] as the host computes them; it keeps its offset."""
        if inputs.get("mm_token_type_ids") is None:  # the host counts such a prompt like text
            self.core.rope_deltas = torch.zeros(len(ids), 1, dtype=torch.long, device=ids.device)
            return (real.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        index = self.core.get_rope_index
        given = {name: inputs[name] for name in signature_of(index).parameters if inputs.get(name) is not None}
        positions, self.core.rope_deltas = index(**given | {"input_ids": ids, "attention_mask": real.long()})
        return positions

    def following(self, counted: Tensor) -> Tensor:
        """Positions of tokens behind the prompt, [3, B, q], of their numbers [B or 1, q] among the real ones."""
        offset = self.core.rope_deltas
        return (counted + offset.repeat_interleave(max(1, len(counted) // len(offset)), 0)).expand(3, -1, -1)


class QwenVL(Axes, RowsAdapter):
    """A Qwen-VL model; a family adds its name and its tower's own arguments."""

    stages = dict.fromkeys(Stage, "")
    videos = True
    layout = PACKED
    parts = ("visual.merger", "language_model")

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        visual = self.core.visual
        self.merge = visual.spatial_merge_size
        self.tower = packed_tower(visual, visual.patch_embed.patch_size)
        self.tokens = {"image": model.config.image_token_id, "video": model.config.video_token_id}

    # -- images ---------------------------------------------------------------------------------------------------

    def images(self, inputs: Mapping[str, Any]) -> list[Image]:
        found = []
        for kind, name in VALUES.items():
            grids = inputs[GRIDS[kind]].tolist() if inputs.get(name) is not None else []
            found += [self._image(kind, *grid, inputs[name].device) for grid in grids]
        return found

    def _image(self, kind: str, frames: int, rows: int, columns: int, device: torch.device) -> Image:
        patches = frames * rows * columns
        total = patches // self.merge**2
        film = frames, rows // self.merge, columns // self.merge
        return Image(
            total=total,
            index=torch.arange(total, device=device),
            kind=kind,
            token=self.tokens[kind],
            tiles=frames,
            patches=patches,
            projectable=total,
            grid=(frames * rows // self.merge, columns // self.merge),
            film=film if kind == "video" else None,
        )

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels of all patches [S, C] in merge order -> rows per image [n, C]: averages of whole squares."""
        totals = (inputs[GRIDS[kind]].prod(-1) // self.merge**2).tolist()
        return maps.unflatten(0, (-1, self.merge**2)).mean(1).split(totals)

    def units(self, entering: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """[S, D] in merge order -> what goes into the merger per image, [n, m D]."""
        totals = (inputs[GRIDS[kind]].prod(-1) // self.merge**2).tolist()
        return entering.unflatten(0, (-1, self.merge**2)).flatten(1).split(totals)

    def kept_arguments(self, visual: nn.Module, grid: Tensor) -> dict[str, Tensor]:
        """What the tower computes per patch from the full grid [images, 3]: position ids [S, 2]."""
        return {"position_ids": function_of(visual, "get_vision_position_ids")(grid, self.merge)}

    def windows(self, visual: nn.Module, grid: Tensor) -> tuple[Tensor, Tensor] | None:
        """Order of the merge units inside the tower, and ends of its windows in patches; None: raster, no windows."""
        return None
