"""Images of one tile, all with equally many tokens, whose rows are the tower's tokens one by one.

Hooks cut them on their way into the first block of the tower and into the projector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.signals import EmbeddingView, PatchesView, RowsView, Signal, Tap
from vtp_plugin.signals.views import tapped
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.layout import Layout
from vtp_plugin.surgery.pixels import fingerprints, patches
from vtp_plugin.surgery.question import CallQuestions
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.surgery.vision import Cutting, VisionCuts
from vtp_plugin.tokens import Selection


class WholeEarly(Cutting):
    """Cuts before the first block of the tower: the pixels stage, and the vit stage outside of blocks."""

    def install(self, undo: Undo) -> None:
        if self.vision.at(Stage.PIXELS, Stage.VIT) or self.vision.tapping(Tap.CONTENT):
            undo.after(self.tower.embeddings, self._embedded)
        if self.vision.at(Stage.VIT):
            undo.after(self.tower.patch_embedding, self._patches_embedded)

    def _patches_embedded(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Keep the embeddings of patches [B, D, rows, columns] without their positions."""
        if self.passing is not None:
            self.passing.embedded = output.flatten(2).transpose(1, 2)  # [B, N, D]

    def _embedded(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        """Cut [B, prefix + N, D] on its way into the first block."""
        if self.passing is None:
            return None
        values = args[0] if args else kwargs["pixel_values"]
        images = self.vision.pixels.images(values) if self.vision.pixels else None
        self._identify(images)
        columns, made, prefix = self._every_patch(output), False, self.tower.prefix
        for strategy in self.vision.at(Stage.PIXELS, Stage.VIT):
            if strategy in self.vision.merging:
                continue
            selection = self._cut(strategy, columns, values, images, output)
            if selection.places is not None:
                values, output = self._remade(selection, values, output)
                columns, made = self._every_patch(output), True
            else:
                columns = columns.gather(1, torch.stack(selection.sources))
        if columns.shape[1] + prefix == output.shape[1]:
            return output if made else None
        return torch.cat([output[:, :prefix], attention.take(output, columns + prefix)], dim=1)

    def _cut(
        self, strategy: PruningStrategy, columns: Tensor, values: Tensor, images: Tensor | None, output: Tensor
    ) -> Selection:
        """What one more strategy leaves of the patches in `columns` [B, N]."""
        with self.session.judging(strategy) as cut:
            if strategy.stage is Stage.PIXELS:
                view = PatchesView(attention.take(patches(images, self.tower.patch_size), columns), self.vision.marks())
                tokens = view.pixels.flatten(2)
            else:
                view = EmbeddingView(
                    attention.take(output, columns + self.tower.prefix),
                    self.vision.marks(),
                    lambda: centered(self.vision, values, columns),
                )
                tokens = attention.take(self.passing.embedded, columns)
            found = self.vision.found_in(strategy, view)
            return cut.decide(tokens, self.passing.batch, self.tower.grid, found)

    def _remade(self, selection: Selection, values: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel values (one row of patches) and embeddings [B, prefix + K, D] of new patches at new places."""
        size, embed, pixels = self.tower.patch_size, self.tower.patch_embedding, self.vision.pixels
        mean, std = pixels.scale(values.device)
        tiles = torch.stack(selection.tokens).unflatten(2, (3, size, size)).permute(0, 2, 3, 1, 4).flatten(3)
        row = ((tiles.float() / 255 - mean) / std).to(embed.weight.dtype)  # [B, 3, p, K p]
        nothing = torch.zeros_like(values[:1], dtype=embed.weight.dtype)
        blank = embed.forward(nothing).flatten(2).transpose(1, 2)  # a bias, if the family has one
        table = (self.tower.embeddings.forward(nothing)[:, self.tower.prefix :] - blank)[0].float()
        where = torch.stack([interpolated(table, self.tower.grid, places) for places in selection.places])
        embedded = embed.forward(row).flatten(2).transpose(1, 2)  # [B, K, D]
        if self.passing.embedded is not None:
            self.passing.embedded = embedded
        new = (embedded.float() + where).to(output.dtype)
        return row, torch.cat([output[:, : self.tower.prefix], new], dim=1)

    def _every_patch(self, output: Tensor) -> Tensor:
        """The columns [B, N] of all patches in [B, prefix + N, D]."""
        n = output.shape[1] - self.tower.prefix
        return torch.arange(n, device=output.device).expand(len(output), n)

    def _identify(self, images: Tensor | None) -> None:
        """Set the fingerprints of the images [B, 3, H, W] uint8."""
        if self.vision.tapping(Tap.CONTENT):
            for number, mark in zip(self.passing.batch, fingerprints(images), strict=True):
                self.call.images[number].fingerprint = mark


def centered(vision: VisionCuts, values: Tensor, columns: Tensor) -> Tensor:
    """Embeddings [B, K, D] of some patches of pixel values [B, 3, H, W] without their mean colour."""
    size, embed = vision.tower.patch_size, vision.tower.patch_embedding
    mean = torch.nn.functional.avg_pool2d(values.float(), size)
    flat = values.float() - mean.repeat_interleave(size, 2).repeat_interleave(size, 3)
    embedded = embed.forward(flat.to(embed.weight.dtype))  # [B, D, rows, columns]
    return attention.take(embedded.flatten(2).transpose(1, 2), columns)


def interpolated(table: Tensor, grid: tuple[int, int], places: Tensor) -> Tensor:
    """Bilinear interpolation of position embeddings [N, D] at places [K, 2] (row, column) of the grid, [K, D]."""
    places = torch.stack([places[:, axis].clamp(min=0, max=side - 1) for axis, side in enumerate(grid)], dim=1)
    low = places.floor().long()
    high = torch.stack([(low[:, axis] + 1).clamp(max=side - 1) for axis, side in enumerate(grid)], dim=1)
    share = places - low
    total = torch.zeros(len(places), table.shape[1], device=table.device)
    for rows, down in ((low[:, 0], 1 - share[:, 0]), (high[:, 0], share[:, 0])):
        for cols, across in ((low[:, 1], 1 - share[:, 1]), (high[:, 1], share[:, 1])):
            total += (down * across)[:, None] * table[rows * grid[1] + cols]
    return total


class WholeLate(Cutting):
    """Cuts on the way into the projector."""

    def install(self, undo: Undo) -> None:
        if self.vision.at(Stage.PROJECTOR):
            undo.before(self.vision.family.projector, self._projecting)

    def _projecting(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], Any] | None:
        if self.passing is None:
            return None
        return (self.cut(args[0]), *args[1:]), kwargs

    def cut(self, tokens: Tensor) -> Tensor:
        """What is left of the tokens [B, N, D]."""
        columns = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
        for strategy in self.vision.at(Stage.PROJECTOR):
            with self.session.judging(strategy) as cut:
                rows = TowerRows(self.vision, strategy, tokens, columns)
                found = self.vision.signals_of(strategy, rows, rows.carried)
                selection = cut.decide(tokens, self.passing.batch, self.tower.grid, found)
            if not selection.keeps_all:
                tokens = torch.stack(selection.apply(tokens))
                columns = columns.gather(1, torch.stack(selection.sources).clamp(min=0))
        return tokens


class TowerRows(RowsView):
    """Tokens [B, N, D] in front of the projector, at `columns` [B, N] of what the tower puts out."""

    def __init__(self, vision: VisionCuts, strategy: PruningStrategy, tokens: Tensor, columns: Tensor) -> None:
        self.vision, self.tower, self.passing = vision, vision.tower, vision.passing
        self.strategy, self.tokens, self.columns = strategy, tokens, columns
        self.embedded, self.fingerprint = strategy.text_encoder == "llm", vision.marks()
        self.device = columns.device

    @property
    def block(self) -> int:
        return self.tower.number(self.strategy.tower_layer)

    @cached_property
    def projected(self) -> Tensor:
        with torch.no_grad():
            return self.vision.family.projector.forward(self.tokens)  # without hooks: not yet the host's turn

    @property
    def space(self) -> CallQuestions:
        return self.vision.questions_in(self.strategy)

    @property
    def questions(self) -> Sequence[str]:
        return [self.vision.call.images[number].question for number in self.passing.batch]

    def output(self, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = tapped(self.passing.outputs.get(self.block), "OUTPUT")
        return make(attention.take(hidden, self.columns + self.tower.prefix))

    @property
    def class_feature(self) -> Tensor | None:
        if not self.tower.prefix:
            return None
        return tapped(self.passing.outputs.get(self.tower.number(None)), "CLASS")[:, 0]

    def carried(self, signal: Signal, block: int) -> Tensor | None:
        """What was read in a block, of the tokens that are left."""
        if signal.several_views:
            return None
        if not signal.per_token:
            return self.passing.whole[signal.name, block]
        return attention.take(self.passing.maps[signal.name, block], self.columns).float()


WHOLE = Layout(WholeEarly, WholeLate)
