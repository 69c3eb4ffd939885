"""What pruning did to one image of a call, in the coordinates of the picture: what stayed, scores, where tokens went.

Attached to a pruned model only while somebody looks: it keeps references to what the strategies answered and to the
pixel values until the call has ended, and computes nothing inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtp_plugin.errors import PruningError
from vtp_plugin.surgery.call import Call, Decision, Image
from vtp_plugin.surgery.pixels import Pixels, laid_out

if TYPE_CHECKING:
    from vtp_plugin.pruning import Pruned


@dataclass(frozen=True)
class Observation:
    """One image of a finished call. Positions are in raster order over the grid of the shown view."""

    grid: tuple[int, int]
    total: int  # tokens of the image without pruning
    left: int  # tokens that the last decoder layer sees
    kept: list[int]  # positions of those, as far as they have one in this view
    pixels: Tensor | None  # [3, H, W] uint8: the view as the model saw it, None where it cannot be recovered
    scores: Tensor | None  # [rows * columns] fp32, nan where nothing was judged; None: no strategy ranks
    scored_by: str
    into: list[int]  # per position, the one that it was merged into, -1: none; empty if no merge is recorded
    view: str  # "" or what part of the image the grid shows


class Observer:
    """Looks on while a pruned model works; `observe(call)` is for the listeners in `pruned.finished`."""

    def __init__(self, pruned: Pruned) -> None:
        self.pruned = pruned
        self.call: Call | None = None  # that the values belong to
        self.values: list[Tensor] = []
        self.pixels = _pixels(pruned.adapter.image_processor)
        pruned.keep_decisions = True
        pruned.on_detach(self.close)
        self._hook = pruned.adapter.tower.module.register_forward_pre_hook(self._entering, with_kwargs=True)

    def close(self) -> None:
        """Observe no more; comes by itself when the model is given back."""
        self.pruned.keep_decisions = False
        self._hook.remove()

    def _entering(self, module: Any, args: Any, kwargs: Any) -> None:
        if self.pruned.call is None:
            return
        if self.pruned.call is not self.call:
            self.call, self.values = self.pruned.call, []
        self.values.append(args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states")))

    def observe(self, call: Call) -> list[Observation | None]:
        """One look per image of the call; None for a video and for tokens that belong to no place."""
        values = self.values if self.call is call else []
        self.call, self.values = None, []
        return [self._observe(call, number, values) for number in range(len(call.images))]

    def _observe(self, call: Call, number: int, values: Sequence[Tensor]) -> Observation | None:
        image = call.images[number]
        place = view_of(image, self.pruned.adapter.tower, self.pruned.adapter.overview)
        if place is None:
            return None
        grid, first, said = place
        n = grid[0] * grid[1]
        decisions = [d for d in call.decisions or () if any(owner == number for owner, _ in d.owners)]
        scores, scored_by = _scores(decisions, number, first, n)
        index = image.index.cpu()
        kept = index[(index >= first) & (index < first + n)] - first
        return Observation(
            grid=grid,
            total=image.total,
            left=len(index) + image.fixed,
            kept=kept.sort().values.tolist(),
            pixels=self._picture(call, number, grid, values),
            scores=scores,
            scored_by=scored_by,
            into=_merged(decisions, number, first, n),
            view=said,
        )

    def _picture(self, call: Call, number: int, grid: tuple[int, int], values: Sequence[Tensor]) -> Tensor | None:
        if self.pixels is None or not values or any(image.kind != "image" for image in call.images):
            return None
        if values[0].ndim == 2:
            return self._unpacked(call, number, grid, torch.cat(list(values)))
        size, block = self.pruned.adapter.tower.patch_size, self.pruned.adapter.tower.block
        if values[0].ndim == 4 and values[0].shape[2] == size < grid[0] * block * size:
            return self._in_a_row(call, number, grid, values[0][0])
        tiles = [tile for batch in values for tile in batch]
        first = sum(image.tiles for image in call.images[:number])
        if len(tiles) != sum(image.tiles for image in call.images):
            return None
        tile = tiles[first + range(call.images[number].tiles)[self.pruned.adapter.overview]]
        if tile.ndim == 2:
            return self._placed(tile, grid)
        return self._unpadded(self.pixels.levels(tile[None])[0].cpu(), call.images[number], grid)

    def _in_a_row(self, call: Call, number: int, grid: tuple[int, int], values: Tensor) -> Tensor:
        """The picture of patches side by side [3, p, S p], those of every image in raster order."""
        size, block = self.pruned.adapter.tower.patch_size, self.pruned.adapter.tower.block
        start, (rows, columns) = sum(other.patches for other in call.images[:number]), (side * block for side in grid)
        image = laid_out(values[..., size * start : size * (start + rows * columns)], rows, columns)
        return self.pixels.levels(image[None])[0].cpu()

    def _placed(self, tile: Tensor, grid: tuple[int, int]) -> Tensor:
        """The picture of patches in raster order [N, p * p * 3], behind which the host may have filled up."""
        size, block = self.pruned.adapter.tower.patch_size, self.pruned.adapter.tower.block
        rows, columns = (side * block for side in grid)
        patches = tile[: rows * columns].unflatten(1, (size, size, 3)).permute(0, 3, 1, 2)
        levels = self.pixels.levels(patches).unflatten(0, (rows, columns))  # [R, C, 3, p, p]
        return levels.permute(2, 0, 3, 1, 4).reshape(3, rows * size, columns * size).cpu()

    def _unpadded(self, levels: Tensor, image: Image, grid: tuple[int, int]) -> Tensor:
        """Without the border that a batch of unequal pictures has, where every image has a grid of its own."""
        tower = self.pruned.adapter.tower
        if tower.grid != (1, 1):
            return levels
        side = tower.patch_size * isqrt(image.patches // image.total)
        return levels[:, : grid[0] * side, : grid[1] * side]

    def _unpacked(self, call: Call, number: int, grid: tuple[int, int], values: Tensor) -> Tensor:
        """The picture of patches in one sequence [S, 3 * t * p * p], unit by unit."""
        tower, image = self.pruned.adapter.tower, call.images[number]
        start = sum(other.patches for other in call.images[:number])
        size, b = tower.patch_size, tower.block
        patches = values[start : start + image.patches].unflatten(1, (3, -1, size))  # [S, 3, t * p, p]
        units = self.pixels.levels(patches[:, :, :size]).unflatten(0, (*grid, b, b))  # [R, C, b, b, 3, p, p]
        return units.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, grid[0] * b * size, grid[1] * b * size).cpu()


def view_of(image: Image, tower: Any, overview: int) -> tuple[tuple[int, int], int, str] | None:
    """Grid of the part of the image that is shown, position of its first token, and what it is; None: no grid."""
    if image.kind != "image":
        return None
    grid = image.grid or (tower.grid[0] // tower.block, tower.grid[1] // tower.block)
    if image.grid and image.tiles > 1:
        grid = (image.grid[0] // image.tiles, image.grid[1])
    area = grid[0] * grid[1]
    if area > image.total:
        return None
    if image.tiles == 1:
        return grid, 0, ""
    first = 0 if overview == 0 else image.total - area
    return grid, first, f"the whole picture, one of {image.tiles} tiles"


def _scores(decisions: Sequence[Decision], number: int, first: int, n: int) -> tuple[Tensor | None, str]:
    """The scores of the first strategy that ranks, and its name."""
    ranking = next((d.strategy for d in decisions if d.selection.scores is not None), "")
    found = torch.full((n,), float("nan"))
    if not ranking:
        return None, ""
    layers = [d for d in decisions if d.strategy == ranking]
    for decision in reversed(layers):  # the first cut saw most and has the last word
        for row, (owner, shift) in enumerate(decision.owners):
            if owner == number and decision.selection.scores is not None:
                _put(found, decision.index[row].cpu() + shift - first, decision.selection.scores[row].float().cpu())
    return found, ranking


def _put(target: Tensor, positions: Tensor, values: Tensor) -> None:
    inside = (positions >= 0) & (positions < len(target))
    target[positions[inside]] = values[inside]


def _merged(decisions: Sequence[Decision], number: int, first: int, n: int) -> list[int]:
    """Per position, where its token ended, through all cuts; empty if no merge is recorded."""
    into = torch.full((n,), -1)
    for decision in decisions:
        for row, (owner, shift) in enumerate(decision.owners):
            if owner != number or decision.selection.into is None:
                continue
            positions = decision.index[row].cpu() + shift - first
            column = decision.selection.into[row].cpu()
            moved = (column >= 0) & (column != torch.arange(len(column)))
            step = torch.arange(n)
            _put(step, positions[moved], positions[column[moved]])
            step[(step < 0) | (step >= n)] = -1
            into = torch.where(into >= 0, step[into.clamp(min=0)], torch.where(step != torch.arange(n), step, -1))
    return into.tolist() if (into >= 0).any() else []


def _pixels(image_processor: Any) -> Pixels | None:
    try:
        return Pixels.of(image_processor)
    except (PruningError, AttributeError):
        return None
