"""The vision towers of the Qwen families, which take the patches of all images in one sequence. No family itself.

A unit is a square of patches (2x2) that becomes one token; its patches lie side by side. Units are judged as a whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.facts.tower import Tower
from vtp_plugin.signals import BlockView, EmbeddingView, PatchesView, Tap
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.judging import Judgement
from vtp_plugin.surgery.layout import Block, Layout, sequences_view
from vtp_plugin.surgery.passes import TowerPass
from vtp_plugin.surgery.pixels import fingerprints, squares
from vtp_plugin.surgery.rows import RowsLate
from vtp_plugin.surgery.tiles import refuse_shared_number
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.surgery.vision import Cutting

SEQUENCES = ("cu_seqlens", "cu_window_seqlens")  # the tower's arguments that say where sequences of patches end


def packed_tower(visual: nn.Module, patch_size: int) -> Tower:
    """The parts of a Qwen-VL's vision tower, which merges blocks of patches."""
    return Tower(
        module=visual,
        embeddings=visual.patch_embed,
        patch_embedding=visual.patch_embed,
        blocks=visual.blocks,
        post_layernorm=None,
        prefix=0,
        grid=(1, 1),  # every image has its own
        patch_size=patch_size,
        projected=-1,
        attention="attn",
        block=visual.spatial_merge_size,
    )


def begin(passing: TowerPass, grid: Tensor, unit: int) -> None:
    """The tower runs on images of these frames, rows and columns of patches [B, 3]; `unit` patches are one token."""
    passing.grid = grid.cpu()
    passing.offsets = [0, *accumulate((passing.grid.prod(-1) // unit).tolist())]


def back_to_raster(passing: TowerPass, order: Tensor, unit: int) -> None:
    """The signals that were read in the tower's own order of units [U], patch by patch in raster order."""
    for read in (passing.maps, passing.outputs):
        for key, signal in read.items():
            read[key] = put(passing, signal.unflatten(0, (-1, unit)), order).flatten(0, 1)


def put(passing: TowerPass, rows: Tensor, where: Tensor) -> Tensor:
    """Rows [K, ...] of some units at their places among all units, [U, ...], zero elsewhere."""
    return rows.new_zeros(passing.offsets[-1], *rows.shape[1:]).index_copy_(0, where, rows)


def identify(early: Cutting, levels: Tensor | None, unit: int) -> None:
    """Set the fingerprints of images from their patches [S, 3, t * p, p] uint8."""
    passing = early.passing
    if not early.vision.tapping(Tap.CONTENT):
        return
    patches = [(b - a) * unit for a, b in pairwise(passing.offsets)]
    marks = fingerprints(own.transpose(0, 1).flatten(2) for own in levels.split(patches))
    for number, mark in zip(passing.batch, marks, strict=True):
        early.call.images[number].fingerprint = mark


def levels_of(early: Cutting, values: Tensor) -> Tensor | None:
    """The uint8 patches behind pixel values [S, 3 * t * p * p] -> [S, 3, t * p, p]; None where nobody reads them."""
    pixels = early.vision.pixels
    return None if pixels is None else pixels.levels(values.unflatten(1, (3, -1, early.tower.patch_size)))


class PackedEarly(Cutting):
    """Cuts of the pixels and vit stages: the tower runs on the units that are left, of all images in one sequence."""

    def check(self, strategy: PruningStrategy) -> None:
        refuse_shared_number(strategy)

    def install(self, undo: Undo) -> None:
        self.forward = undo.override(self.tower.module, "forward", self._tower)

    def _tower(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """The tower's `forward` on patches [S, C] of images [B, 3], which inside of a call is on the host."""
        passing = self.passing
        if passing is None:
            return self.forward(hidden_states, grid_thw=grid_thw, **kwargs)
        begin(passing, self._by_image(grid_thw), self._unit)
        units = self._decided(passing)
        passing.packed = [len(kept) * self._unit for kept in units]
        kept = torch.cat([unit + start for unit, start in zip(units, passing.offsets[:-1], strict=True)])
        whole = len(kept) == passing.offsets[-1]
        on_host, every = None if whole else kept.cpu(), torch.arange(passing.offsets[-1])
        order, arguments = self._arguments(passing, every if whole else on_host)
        lengths = {name: arguments[name].diff().tolist() for name in SEQUENCES if name in arguments}
        grid = passing.grid.to(grid_thw.dtype)
        if len(grid_thw) > len(grid):  # of the frames of videos
            grid = grid_thw.cpu() if whole else grid_thw.cpu()[self._frames_left(passing, on_host)]
        arguments = _copied({"grid_thw": grid} | arguments, kept.device)
        passing.sequences = [(arguments[name], of) for name, of in lengths.items()]
        kwargs |= arguments
        if whole:
            output = self.forward(hidden_states, **kwargs)
        else:
            values = hidden_states.unflatten(0, (-1, self._unit))[kept].flatten(0, 1)
            output = self._widened(passing, self.forward(values, **kwargs), kept, on_host)
        if order is not every:
            self._put_back(passing, arguments["window_index"] if whole else order.to(kept.device))
        return output

    def _put_back(self, passing: TowerPass, order: Tensor) -> None:
        """What was read in the tower's own order of units [U], and what went into the merger, in raster order."""
        back_to_raster(passing, order, self._unit)
        if any("units" in strategy.needs for strategy in self.vision.at(Stage.PROJECTOR)):
            each = len(passing.features) // len(order)  # patches, or units side by side
            passing.features = put(passing, passing.features.unflatten(0, (-1, each)), order).flatten(0, 1)

    def _by_image(self, grid: Tensor) -> Tensor:
        """Frames, rows and columns per image [images, 3], where the host gives a row per frame of a video."""
        frames = [self.call.images[number].tiles for number in self.passing.batch]
        if len(grid) == len(frames):
            return grid
        whole = grid[torch.tensor([0, *accumulate(frames)][:-1], device=grid.device)]
        return torch.cat([torch.tensor(frames, device=grid.device)[:, None], whole[:, 1:]], dim=1)

    def _frames_left(self, passing: TowerPass, kept: Tensor) -> Tensor:
        """The frames of which some unit is among those kept [K], [F] bool."""
        units = (passing.grid[:, 1:].prod(-1) // self._unit).repeat_interleave(passing.grid[:, 0])
        frame = torch.arange(len(units), device=units.device).repeat_interleave(units)
        return torch.zeros(len(units), dtype=torch.bool, device=units.device).index_fill_(0, frame[kept], True)

    def _arguments(self, passing: TowerPass, kept: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """On the host: the kept units [K] in the tower's order, and its arguments for them.

        All of them if some were dropped, else those that say which patches attend to each other.
        """
        visual, grid, total, arguments = self.tower.module, passing.grid, passing.offsets[-1], {}
        if len(kept) < total:
            patches = (kept[:, None] * self._unit + torch.arange(self._unit)).flatten()
            made = self.family.kept_arguments(visual, grid)
            arguments = {name: value[patches] for name, value in made.items()}
        frames = grid[:, 1:].prod(-1).repeat_interleave(grid[:, 0])
        there = torch.zeros(total, dtype=torch.bool).index_fill_(0, kept, True)
        arguments["cu_seqlens"] = _ends(there, frames.cumsum(0), self._unit)
        windows = self.family.windows(visual, grid)
        if windows is None:
            return kept, arguments
        order = windows[0][there[windows[0]]]
        arguments["cu_window_seqlens"] = _ends(there[windows[0]], windows[1][1:], self._unit)
        arguments["window_index"] = torch.searchsorted(kept, order)
        return order, arguments

    def _widened(self, passing: TowerPass, output: Any, kept: Tensor, on_host: Tensor) -> Any:
        """The tower's output with one merged row per unit, [units, D], zero where it was dropped; `kept` [K] long."""
        alive = put(passing, torch.ones_like(on_host, dtype=torch.bool), on_host)
        passing.alive = alive.repeat_interleave(self._unit)
        output.pooler_output = put(passing, output.pooler_output, kept)
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [put(passing, rows, kept) for rows in output.deepstack_features]
        return output

    # -- deciding -------------------------------------------------------------------------------------------------

    def _decided(self, passing: TowerPass) -> list[Tensor]:
        """The units that are left of every image, [n] long."""
        starts, values = passing.offsets, passing.values
        levels = self._levels()
        identify(self, levels, self._unit)
        units = [torch.arange(b - a, device=values.device) for a, b in pairwise(starts)]
        embedded = self._embedded(values) if self.vision.at(Stage.VIT) else None
        seen = levels, embedded, cache(lambda: self._embedded(_without_colour(values)))
        for strategy in self.vision.at(Stage.PIXELS, Stage.VIT):
            with self.session.judging(strategy) as cut:
                before = [len(kept) for kept in units]
                for image in range(len(units)):
                    units[image] = units[image][self._selected(cut, image, units[image], *seen)]
                for number, count, kept in zip(passing.batch, before, units, strict=True):
                    cut.note(number, count, kept)
        return units

    def _levels(self) -> Tensor | None:
        """The uint8 patches of the images in the tower [S, 3, t * p, p]; None where nobody reads them."""
        return levels_of(self, self.passing.values)

    def _selected(
        self, cut: Judgement, image: int, units: Tensor, levels: Any, embedded: Any, colourless: Callable[[], Tensor]
    ) -> Tensor:
        """The columns of the units [K] of an image that one more strategy leaves."""
        passing, number = self.passing, self.passing.batch[image]
        where, picture = units + passing.offsets[image], self.call.images[number]
        mark = (picture.fingerprint,)
        if cut.strategy.stage is Stage.PIXELS:
            pixels = self._unit_pixels(levels, where, bool(passing.grid[image, 0] > 1))[None]
            tokens, view = pixels.flatten(2), PatchesView(pixels, mark)
        else:
            tokens = embedded[where][None]
            view = EmbeddingView(self._positioned(tokens, where), mark, lambda: colourless()[where][None])
        found = self.vision.found_in(cut.strategy, view)
        return cut.ask(tokens, units[None], picture.grid, found, [(number, 0)]).sources[0]

    def _positioned(self, tokens: Tensor, where: Tensor) -> Tensor:
        """Embedded units [1, K, b * b * D] with their positions: rotary ones are added to no embedding."""
        return tokens

    def _embedded(self, values: Tensor) -> Tensor:
        """Patch embeddings, one unit a row: [S, C] -> [U, b * b * D]."""
        return self.tower.patch_embedding(values).reshape(len(values) // self._unit, -1)

    def _unit_pixels(self, levels: Tensor, where: Tensor, video: bool) -> Tensor:
        """Some units [K] as larger patches: levels [S, 3, t * p, p] -> [K, 3, b * p, b * p]; video frames stacked."""
        chosen = levels.unflatten(0, (-1, self._unit))[where]
        return squares(chosen, self.tower.block, self.tower.patch_size, video)

    @property
    def _unit(self) -> int:
        return self.tower.block**2


def _copied(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of the host on a device; all whole numbers in one copy."""
    whole = {name: value for name, value in tensors.items() if not value.is_floating_point()}
    flat = torch.cat([value.long().flatten() for value in whole.values()]).to(device)
    parts = zip(whole.items(), flat.split([value.numel() for value in whole.values()]), strict=True)
    there = {name: part.view(value.shape).to(value.dtype) for (name, value), part in parts}
    return {name: value.to(device) for name, value in tensors.items() if name not in whole} | there


def _without_colour(values: Tensor) -> Tensor:
    """Pixel values [S, 3 * ...] without the mean colour of every patch."""
    channels = values.unflatten(1, (3, -1))
    return (channels - channels.mean(-1, keepdim=True)).flatten(1)


def _ends(there: Tensor, ends: Tensor, unit: int) -> Tensor:
    """Cumulative lengths of sequences after a cut: units that are there [U], ends of the full ones in patches."""
    counts = torch.nn.functional.pad(there.long().cumsum(0), (1, 0)) * unit
    shortened = torch.nn.functional.pad(counts[ends.long() // unit], (1, 0))
    return shortened.unique_consecutive().to(torch.int32)


def function_of(module: nn.Module, name: str) -> Callable[..., Any]:
    """A function that the module's own file uses."""
    return getattr(sys.modules[type(module).__module__], name)


def interpolated(visual: nn.Module, grid: Tensor, merge: int) -> dict[str, Tensor]:
    """What a tower with a table of position embeddings computes per patch to interpolate them."""
    taps = function_of(visual, "get_vision_interpolation_indices_and_weights")(
        grid,
        num_grid_per_side=visual.num_grid_per_side,
        mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners,
        spatial_merge_size=merge,
    )
    return dict(zip(("interp_indices", "interp_weights"), taps, strict=True))


# -- the layout -------------------------------------------------------------------------------------------------------


def packed_block(block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockView:
    """A block that makes q, k and v at once or one by one, called with normed hidden states [S, D]."""
    module = block.attention
    hidden = args[0] if args else kwargs["hidden_states"]
    query, key, values = attention.parts(module, hidden)  # [S, H, d]
    turned = function_of(module, "apply_rotary_pos_emb_vision")(query, key, *kwargs["position_embeddings"])
    query, rotated, keys = (part.transpose(0, 1) for part in (*turned, key))  # [H, S, d]
    lengths, factor = _lengths(block.passing, kwargs["cu_seqlens"]), attention.scale(module)
    return sequences_view(query, rotated, keys, lengths, factor, values=lambda: values.transpose(0, 1))


def _lengths(passing: TowerPass, ends: Tensor) -> list[int]:
    """Of sequences that end there; asked of the device where somebody moved the ends to another one."""
    known = [lengths for given, lengths in passing.sequences if given is ends]
    return known[0] if known else ends.diff().tolist()


def every_patch(tower: Tower, passing: TowerPass) -> tuple[int, ...]:
    """Maps [S] of all patches in one sequence."""
    return (passing.offsets[-1] * tower.block**2,)


def frames(tower: Tower, passing: TowerPass) -> Tensor:
    """The frame of every patch, [S]."""
    return torch.cat([torch.arange(t).repeat_interleave(h * w) for t, h, w in passing.grid.tolist()]).float()


PACKED = Layout(PackedEarly, RowsLate, packed_block, every_patch, frames)
