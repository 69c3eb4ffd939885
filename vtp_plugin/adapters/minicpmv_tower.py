"""The tower of MiniCPM-V: pictures of any size in one sequence, merged inside it and behind it. No family itself.

A token of the prompt is a square of patches (4x4), which is judged and dropped as a whole. The tower rotates nothing,
so what is left of a picture runs as one of a single row of squares, with the position embeddings of the whole: the
host's own windows and mergers never see a part of a square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtp_plugin.adapters.qwen_tower import PackedEarly, begin, every_patch, function_of, put
from vtp_plugin.signals import BlockView
from vtp_plugin.stages import Stage
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.columns import Rows
from vtp_plugin.surgery.layout import Block, Layout, sequences_view
from vtp_plugin.surgery.passes import TowerPass
from vtp_plugin.surgery.rows import RowsLate
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.tokens import true_columns

PLACES = "get_vision_nearest_position_ids"

Grids = Sequence[tuple[int, int]]  # rows and columns of the squares of every image


def by_square(rows: Tensor, side: int, grids: Grids) -> Tensor:
    """What images have per place, in raster order [S, ...], square by square: [U, side^2, ...]."""
    images = rows.split([down * across * side**2 for down, across in grids])
    cut = [
        image.unflatten(0, (down, side, across, side)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        for image, (down, across) in zip(images, grids, strict=True)
    ]
    return torch.cat(cut)


def by_raster(squares: Tensor, side: int, grids: Grids) -> Tensor:
    """The way back, [U, side^2, ...] -> [S, ...]."""
    images = squares.unflatten(1, (side, side)).split([down * across for down, across in grids])
    joined = [image.unflatten(0, grid).transpose(1, 2).flatten(0, 3) for image, grid in zip(images, grids, strict=True)]
    return torch.cat(joined)


def whole_grids(passing: TowerPass, side: int) -> Grids:
    """The squares of the images as they are."""
    return [(rows // side, columns // side) for _, rows, columns in passing.grid.tolist()]


def run_grids(passing: TowerPass, side: int) -> Grids:
    """The squares that the tower runs on: a single row of every image, where some were dropped."""
    if passing.alive is None:
        return whole_grids(passing, side)
    return [(1, patches // side**2) for patches in passing.packed]


def left(passing: TowerPass, side: int) -> Tensor:
    """The squares that the tower runs on, among those of all images."""
    return true_columns(passing.alive[:: side**2], sum(passing.packed) // side**2)


class SquaresEarly(PackedEarly):
    """Cuts of the pixels and vit stages: the tower runs on the squares that are left."""

    def _tower(self, pixel_values: Tensor, target_sizes: Tensor, **kwargs: Any) -> Any:
        """The tower's `forward` on patches [1, 3, p, S p] of images [B, 2], which in a call are on the host."""
        passing, side = self.passing, self.tower.block
        if passing is None:
            return self.forward(pixel_values, target_sizes=target_sizes, **kwargs)
        begin(passing, pad(target_sizes, (1, 0), value=1), self._unit)
        grids, squares = whole_grids(passing, side), None
        if self.vision.pixels or self._cutting:
            patches = pixel_values[0].unflatten(-1, (-1, self.tower.patch_size)).permute(2, 0, 1, 3)  # [S, 3, p, p]
            squares = by_square(patches, side, grids)
            passing.values = squares.flatten(0, 1).flatten(1)
        if self._cutting:
            table = self.tower.embeddings.num_patches_per_side
            places = function_of(self.tower.module, PLACES)(target_sizes, table)
            passing.places = by_square(places, side, grids).to(pixel_values.device)
        kept = self._decided(passing)
        passing.packed = [len(units) * self._unit for units in kept]
        if sum(map(len, kept)) < passing.offsets[-1]:
            kept = torch.cat([units + start for units, start in zip(kept, passing.offsets[:-1], strict=True)])
            there = torch.zeros(passing.offsets[-1], dtype=torch.bool, device=kept.device).index_fill_(0, kept, True)
            passing.alive = there.repeat_interleave(self._unit)
            rows = run_grids(passing, side)
            pixel_values = by_raster(squares[kept], side, rows).permute(1, 2, 0, 3).flatten(2)[None]
            target_sizes = torch.tensor(rows, dtype=target_sizes.dtype) * side
            kwargs["position_ids"] = by_raster(passing.places[kept], side, rows)
        output = self.forward(pixel_values, target_sizes=target_sizes.to(pixel_values.device), **kwargs)
        passing.maps = {key: self._spread(signal) for key, signal in passing.maps.items()}
        passing.outputs = {key: self._spread(hidden[0]) for key, hidden in passing.outputs.items()}
        return output

    @property
    def _cutting(self) -> bool:
        return bool(self.vision.at(Stage.PIXELS, Stage.VIT))

    def _positioned(self, tokens: Tensor, where: Tensor) -> Tensor:
        """Embedded squares [1, K, side^2 D] with their position embeddings."""
        return tokens + self.tower.embeddings.position_embedding(self.passing.places[where]).flatten(1)

    def _embedded(self, values: Tensor) -> Tensor:
        """Patch embeddings, one square a row: [S, 3 p p] -> [U, side^2 D]."""
        size = self.tower.patch_size
        return super()._embedded(values.unflatten(1, (3, size, size)))

    def _spread(self, signal: Tensor) -> Tensor:
        """What was read of the tokens of a block [n, ...], patch by patch and square by square [S, ...].

        Behind the merger inside the tower a token is several patches, all of the same square.
        """
        passing, side = self.passing, self.tower.block
        merged = sum(passing.packed) // len(signal)
        squares = by_square(signal, side // math.isqrt(merged), run_grids(passing, side))
        squares = squares.repeat_interleave(merged, 1)
        return (squares if passing.alive is None else put(passing, squares, left(passing, side))).flatten(0, 1)


class SquaresLate(RowsLate):
    """Cuts of the projector stage: the merger runs on the squares that are left."""

    def install(self, undo: Undo) -> None:
        super().install(undo)
        self.forward = undo.override(self.family.projector, "forward", self._merge)

    def _merge(self, hidden_states: Tensor, target_sizes: Tensor) -> list[Tensor]:
        """The merger's `forward` on what the tower made [1, n, D] of images [B, 2]."""
        passing, side = self.passing, self.family.merge
        if passing is None:
            return self.forward(hidden_states, target_sizes)
        grids = run_grids(passing, self.tower.block)
        if passing.features is not None:
            squares = by_square(passing.features[0], side, grids).flatten(1)
            cut = passing.alive is not None
            passing.features = put(passing, squares, left(passing, self.tower.block)) if cut else squares
        return self.forward(hidden_states, torch.tensor(grids).to(target_sizes) * side)

    def rows(self, features: Sequence[Tensor]) -> list[tuple[Tensor, Rows]]:
        passing = self.passing
        if passing.alive is not None:  # a row for every square, zero where it was dropped
            every = put(passing, torch.cat(list(features)), left(passing, self.tower.block))
            features = every.split([b - a for a, b in pairwise(passing.offsets)])
        return super().rows(features)


def flat_block(block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockView:
    """A block that takes the tokens of all images in one sequence, called with normed hidden states [1, n, D]."""
    module, hidden = block.attention, args[0] if args else kwargs["hidden_states"]
    query, keys = (attention.heads(module, name, hidden)[0] for name in ("q_proj", "k_proj"))  # [H, n, d]
    merged = sum(block.passing.packed) // hidden.shape[1]
    lengths = [patches // merged for patches in block.passing.packed]
    return sequences_view(
        query,
        keys,
        keys,
        lengths,
        attention.scale(module),
        values=lambda: attention.heads(module, "v_proj", hidden)[0],
    )


SQUARES = Layout(
    SquaresEarly,
    SquaresLate,
    flat_block,
    every_patch,
    tile=lambda tower, passing: torch.zeros(every_patch(tower, passing)),
)
