"""What the Qwen families share: packed tower, square merge units, multi-axis positions. No family itself.

Before the merger, whole merge units (2x2 patches) are judged: a unit's embedding is the concatenation of its patches,
its pixels are one larger patch, its signals the mean of its patches'. There is no class token: the attention that a
patch receives, mean over the queries of its window or frame, stands in for the class token's. Kept tokens keep the
positions that the host computes for the full prompt. A video is one image of several frames; `budget=per_tile` counts
per frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapters.qwen_tower import PACKED, function_of, packed_tower
from vtp_plugin.adapters.rows import VALUES, RowsAdapter
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.call import Image
from vtp_plugin.surgery.columns import Columns
from vtp_plugin.surgery.undo import Undo

GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


class QwenVL(RowsAdapter):
    """A Qwen-VL model; a family adds its name and its tower's own arguments."""

    stages = dict.fromkeys(Stage, "")
    layout = PACKED
    default_positions = "original"
    carried = ("rope_deltas",)  # what the host keeps on its backbone between the passes over one prompt
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
        return Image(
            total=total,
            index=torch.arange(total, device=device),
            kind=kind,
            token=self.tokens[kind],
            tiles=frames,
            patches=patches,
            projectable=total,
            grid=(frames * rows // self.merge, columns // self.merge),
        )

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        totals = (inputs[GRIDS[kind]].prod(-1) // self.merge**2).tolist()
        return maps.unflatten(0, (-1, self.merge**2)).mean(1).split(totals)

    def kept_arguments(self, visual: nn.Module, grid: Tensor) -> dict[str, Tensor]:
        """What the tower computes per patch from the full grid."""
        return {"position_ids": function_of(visual, "get_vision_position_ids")(grid, self.merge)}

    def windows(self, visual: nn.Module, grid: Tensor) -> tuple[Tensor, Tensor] | None:
        """Order of the merge units inside the tower, and ends of its windows in patches; None: raster, no windows."""
        return None

    # -- positions ------------------------------------------------------------------------------------------------

    @contextmanager
    def positions(self, shortened: Columns, ids: Tensor, real: Tensor, *, compact: bool) -> Iterator[None]:
        """Let the model compute positions for the full prompt, and give the kept columns theirs.

        `compact`: prompts that lost tokens are counted like text instead, the same number on all three axes.
        """
        types = sum((ids == token).int() * number for number, token in enumerate(self.tokens.values(), 1))
        dropped = real.sum(1, keepdim=True) - shortened.valid.sum(1, keepdim=True)

        def index(input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            times = len(input_ids) // len(ids)
            full = {"mm_token_type_ids": types, "attention_mask": real.long()}
            table, delta = original(ids, **{k: v for k, v in kwargs.items() if k not in full}, **full)
            columns = shortened.origin.clamp(min=0).expand(3, -1, -1)
            table = torch.where(shortened.valid, table.gather(2, columns), 0)
            delta = delta + dropped
            if compact:
                counted = (shortened.valid.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
                table = torch.where(dropped > 0, counted, table)
                delta = torch.where(dropped > 0, 0, delta)
            return table.repeat_interleave(times, 1), delta.repeat_interleave(times, 0)

        with Undo() as undo:
            original = undo.override(self.core, "get_rope_index", index)
            yield
