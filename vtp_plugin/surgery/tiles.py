"""Cuts inside a tower whose host rearranges its output: tiles with newlines, pixel shuffle, merging, pooling.

From outside, the tower looks unpruned: tokens that a pixels- or vit-stage strategy dropped come out as zeros, so that
the host's own arrangement into rows runs as ever. Then `rows` takes their rows out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.signals import EmbeddingView, PatchesView, Tap
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.batching import alike, moved
from vtp_plugin.surgery.judging import Judgement
from vtp_plugin.surgery.layout import Layout
from vtp_plugin.surgery.passes import TowerPass
from vtp_plugin.surgery.pixels import fingerprints, patches
from vtp_plugin.surgery.rows import RowsLate
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.surgery.vision import Cutting
from vtp_plugin.surgery.whole import centered


def refuse_shared_number(strategy: PruningStrategy) -> None:
    """Inside the tower every tile is judged by itself, so a number cannot count over the tiles of an image."""
    if strategy.keep_tokens is not None and strategy.budget != "per_tile":
        raise strategy.error(
            f"at the {strategy.stage.value} stage keep_tokens counts per tile here: say budget=per_tile, "
            f"or give keep_ratio"
        )


class TiledEarly(Cutting):
    """Cuts of the pixels and vit stages, tile by tile. A unit is a square of patches that becomes one token."""

    _every: Tensor | None = None  # the patches of all units of a tile [U, b * b], beside the last tiles

    def check(self, strategy: PruningStrategy) -> None:
        refuse_shared_number(strategy)

    def install(self, undo: Undo) -> None:
        if self._strategies or self.vision.tapping(Tap.CONTENT):
            self.forward = undo.override(self.tower.module, "forward", self._tower)
        if self._strategies:
            undo.after(self.tower.embeddings, self._gather)
        if self.vision.at(Stage.VIT):
            undo.after(self.tower.patch_embedding, self._patches_embedded)

    def _patches_embedded(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Keep the embeddings of patches [T, D, rows, columns] without their positions."""
        if self.passing is not None:
            self.passing.embedded = output.flatten(2).transpose(1, 2)  # [T, N, D]

    def _gather(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Only the patches that are left of embeddings [T, prefix + N, D], beside which a host may answer more."""
        columns, prefix = None if self.passing is None else self.passing.columns, self.tower.prefix
        if columns is None:
            return None
        whole = _embeddings(output)
        left = torch.cat([whole[:, :prefix], attention.take(whole, columns + prefix)], dim=1)
        return (left, *output[1:]) if isinstance(output, tuple) else left

    def _tower(self, *args: Any, **kwargs: Any) -> Any:
        """The tower's `forward` on tiles [T, 3, H, W]."""
        if self.passing is None:
            return self.forward(*args, **kwargs)
        values = args[0] if args else kwargs["pixel_values"]
        images = self.vision.pixels.images(values) if self.vision.pixels else None
        self._identify(images)
        units = self._decided(values, images)
        if all(len(kept) == self._count for kept in units):
            return self.forward(*args, **kwargs)
        return self._in_groups(units, args, kwargs)

    # -- deciding -------------------------------------------------------------------------------------------------

    def _decided(self, values: Tensor, images: Tensor | None) -> list[Tensor]:
        """The units that are left of every tile."""
        units = [torch.arange(self._count, device=values.device)] * len(values)
        if not self._strategies:
            return units
        embedded = _embeddings(self.tower.embeddings(values)) if self.vision.at(Stage.VIT) else None
        for strategy in self._strategies:
            with self.session.judging(strategy) as cut:
                before = [len(kept) for kept in units]
                for group in _alike(units, values.device):
                    seen = values, images, embedded, self.passing.embedded
                    self._decide_tiles(cut, group.tiles, units, map(group.of, seen))
                self._note(cut, before, units)
        return units

    def _decide_tiles(self, cut: Judgement, group: list[int], units: list[Tensor], seen: Iterable[Any]) -> None:
        """One decision about tiles with equally many units, of which `seen` is the part; `units` is updated."""
        index = torch.stack([units[tile] for tile in group])  # [G, U]
        tokens, view = self._units(cut.strategy, group, index, *seen)
        found, owners = self.vision.found_in(cut.strategy, view), [self._owner(tile) for tile in group]
        selection = cut.ask(tokens, index, self._unit_grid, found, owners)
        for tile, columns in zip(group, selection.sources, strict=True):
            units[tile] = units[tile][columns]

    def _units(
        self,
        strategy: PruningStrategy,
        group: list[int],
        index: Tensor,
        values: Tensor,
        images: Any,
        positioned: Any,
        embedded: Any,
    ) -> tuple[Tensor, PatchesView | EmbeddingView]:
        """Tokens [G, U, D] and signals of units; a unit of several patches is their concatenation, one larger patch."""
        marks = tuple(self.passing.fingerprints[tile] for tile in group) if self.passing.fingerprints else ()
        if strategy.stage is Stage.PIXELS:
            pixels = attention.take(patches(images, self.tower.patch_size * self.tower.block), index)
            return pixels.flatten(2), PatchesView(pixels, marks)
        columns = self._members(index).flatten(1)  # [G, U * b * b]

        def joined(maps: Tensor) -> Tensor:
            """Maps [G, U * b * b, D] unit by unit, [G, U, b * b * D]."""
            return maps.unflatten(1, (*index.shape[1:], -1)).flatten(2)

        placed = joined(attention.take(positioned[:, self.tower.prefix :], columns))
        view = EmbeddingView(placed, marks, lambda: joined(centered(self.vision, values, columns)))
        return joined(attention.take(embedded, columns)), view

    def _owner(self, tile: int) -> tuple[int, int]:
        """The image of a tile, and how many units its earlier tiles have."""
        owners = self.passing.tiles
        return owners[tile], (tile - owners.index(owners[tile])) * self._count

    def _note(self, cut: Judgement, before: Sequence[int], units: Sequence[Tensor]) -> None:
        """Report by image; units of later tiles are counted on."""
        seen: dict[int, int] = {}
        for owner, count, kept in zip(self.passing.tiles, before, units, strict=True):
            cut.note(owner, count, kept + seen.get(owner, 0) * self._count)
            seen[owner] = seen.get(owner, 0) + 1

    def _identify(self, images: Tensor | None) -> None:
        """Set the fingerprints of tiles [T, 3, H, W] uint8; an image has that of its first tile."""
        if not self.vision.tapping(Tap.CONTENT):
            return
        self.passing.fingerprints = fingerprints(images)
        marks = zip(reversed(self.passing.tiles), reversed(self.passing.fingerprints), strict=True)
        for owner, mark in marks:
            self.call.images[owner].fingerprint = mark

    # -- running --------------------------------------------------------------------------------------------------

    def _in_groups(self, units: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
        """Run the tower on tiles of equal lengths together; its output at full length, zero where nothing is left."""
        passing, parts, outputs, groups = self.passing, [], [], _alike(units, units[0].device)
        for group in groups:
            columns = self._members(torch.stack([units[tile] for tile in group.tiles])).flatten(1).sort(-1).values
            with self.call.passing(passing.part(group.tiles, columns)) as part:
                chosen = group.rows_of(args, len(units)), group.rows_of(kwargs, len(units))
                outputs.append(self.forward(*chosen[0], **chosen[1]))
                parts.append(part)
        total = self.tower.grid[0] * self.tower.grid[1]
        spread = _Spread(len(units), total, self.tower.prefix, groups, [part.columns for part in parts])
        self._gathered(passing, parts, spread)
        if isinstance(outputs[0], Tensor):
            return spread(outputs)
        names = outputs[0].keys()
        return type(outputs[0])({name: spread([output[name] for output in outputs]) for name in names})

    def _gathered(self, passing: TowerPass, parts: Sequence[TowerPass], spread: _Spread) -> None:
        """What was read in the parts, of all tiles."""
        for kind in ("maps", "whole", "outputs"):
            read = [getattr(part, kind) for part in parts]
            getattr(passing, kind).update({key: spread([one[key] for one in read]) for key in read[0]})
        passing.alive = spread([part.columns.new_ones(part.columns.shape, dtype=torch.bool) for part in parts])

    @property
    def _strategies(self) -> list[PruningStrategy]:
        return self.vision.at(Stage.PIXELS, Stage.VIT)

    @property
    def _unit_grid(self) -> tuple[int, int]:
        return self.tower.grid[0] // self.tower.block, self.tower.grid[1] // self.tower.block

    @property
    def _count(self) -> int:
        """Units of a tile."""
        return self._unit_grid[0] * self._unit_grid[1]

    def _members(self, units: Tensor) -> Tensor:
        """The patches of units [..., U], [..., U, b * b]."""
        if self._every is None or self._every.device != units.device:  # the model may have been moved since
            (rows, columns), b = self._unit_grid, self.tower.block
            raster = torch.arange(self.tower.grid[0] * self.tower.grid[1], device=units.device)
            self._every = raster.view(rows, b, columns, b).transpose(1, 2).reshape(-1, b * b)
        return self._every[units]


class _Spread:
    """Puts the outputs of runs on groups of tiles back to all tiles and all patches, zero where nothing was run."""

    def __init__(self, tiles: int, total: int, prefix: int, groups: Sequence[Alike], columns: Sequence[Tensor]) -> None:
        self.tiles, self.total, self.prefix = tiles, total, prefix
        self.groups, self.columns = groups, columns

    def __call__(self, parts: Sequence[Any]) -> Any:
        if isinstance(parts[0], tuple):
            return tuple(self(part) for part in zip(*parts, strict=True))
        if parts[0] is None:
            return None
        kept = self.columns[0].shape[1]
        prefix = parts[0].shape[1] - kept if parts[0].ndim > 1 else -1
        if prefix not in (0, self.prefix) or parts[0].ndim not in (2, 3):  # one entry per tile
            full = parts[0].new_zeros(self.tiles, *parts[0].shape[1:])
            for group, part in zip(self.groups, parts, strict=True):
                full[group.slots] = part
            return full
        full = parts[0].new_zeros(self.tiles, prefix + self.total, *parts[0].shape[2:])
        for group, columns, part in zip(self.groups, self.columns, parts, strict=True):
            tile = torch.arange(self.tiles, device=columns.device) if group.where is None else group.where
            full[tile[:, None], columns + prefix] = part[:, prefix:]
            full[group.slots, :prefix] = part[:, :prefix]
        return full


@dataclass(frozen=True)
class Alike:
    """Tiles with equally many units."""

    tiles: list[int]
    where: Tensor | None  # their numbers on the device [G]; None: these are all tiles

    @property
    def slots(self) -> Any:
        """What puts rows at their places among those of all tiles."""
        return slice(None) if self.where is None else self.where

    def of(self, values: Tensor | None) -> Tensor | None:
        """Their rows of values [T, ...]."""
        return values if values is None or self.where is None else values[self.where]

    def rows_of(self, arguments: Any, tiles: int) -> Any:
        """The arguments of a tower for them."""
        if isinstance(arguments, Mapping):
            return {name: self.rows_of((value,), tiles)[0] for name, value in arguments.items()}
        return tuple(self.of(a) if isinstance(a, Tensor) and a.ndim and len(a) == tiles else a for a in arguments)


def _embeddings(output: Any) -> Tensor:
    """Of what a module of embeddings answers."""
    return output[0] if isinstance(output, tuple) else output


def _alike(units: Sequence[Tensor], device: torch.device) -> list[Alike]:
    """All tiles, by how many units they have."""
    groups = alike([len(kept) for kept in units])
    if len(groups) == 1:
        return [Alike(groups[0], None)]
    numbers = moved([torch.tensor(group) for group in groups], device)
    return [Alike(group, where) for group, where in zip(groups, numbers, strict=True)]


TILED = Layout(TiledEarly, RowsLate)
