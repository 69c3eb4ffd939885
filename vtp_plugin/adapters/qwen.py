"""What the Qwen families share: packed tower, square merge units, multi-axis positions. No family itself.

Before the merger, whole merge units (2x2 patches) are judged: a unit's embedding is the concatenation of its patches,
its pixels are one larger patch, its signals the mean of its patches'. There is no class token: the attention that a
patch receives, mean over the queries of its window or frame, stands in for the class token's. Kept tokens keep the
positions that the host computes for the full prompt. A video is one image of several frames; `budget=per_tile` counts
per frame.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapter import Tower
from vtp_plugin.adapters.rows import VALUES, RowsAdapter
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.call import Image
from vtp_plugin.surgery.pixels import fingerprint
from vtp_plugin.surgery.prompt import Shortened
from vtp_plugin.surgery.tiles import TileCuts
from vtp_plugin.surgery.undo import Undo

if TYPE_CHECKING:
    from vtp_plugin.pruning import Judgement, Pruned

GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


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


class QwenVL(RowsAdapter):
    """A Qwen-VL model; a family adds its name and its tower's own arguments."""

    stages = dict.fromkeys(Stage, "")
    default_positions = "original"
    parts = ("visual.merger", "language_model")

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        visual = self.core.visual
        self.merge = visual.spatial_merge_size
        self.tower = packed_tower(visual, visual.patch_embed.patch_size)
        self.tokens = {"image": model.config.image_token_id, "video": model.config.video_token_id}

    def vision(self, pruned: Pruned) -> PackedCuts:
        self.cuts = PackedCuts(pruned, self)
        return self.cuts

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
        return {"position_ids": _function(visual, "get_vision_position_ids")(grid, self.merge)}

    def windows(self, visual: nn.Module, grid: Tensor) -> tuple[Tensor, Tensor] | None:
        """Order of the merge units inside the tower, and ends of its windows in patches; None: raster, no windows."""
        return None

    # -- positions ------------------------------------------------------------------------------------------------

    @contextmanager
    def positions(self, shortened: Shortened, ids: Tensor, real: Tensor, *, compact: bool) -> Iterator[None]:
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


class PackedCuts(TileCuts):
    """The cuts of a tower that takes the patches of all images in one sequence, [S, C]."""

    def install(self, undo: Undo) -> None:
        self.forward = undo.override(self.tower.module, "forward", self._tower)
        self._install_readers(undo)

    def _tower(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        if not self._active:
            return self.forward(hidden_states, grid_thw=grid_thw, **kwargs)
        self.grid, self.offsets = grid_thw, [0, *accumulate((grid_thw.prod(-1) // self._unit).tolist())]
        values = self._call.scratch["values"]
        levels = self._levels(values) if self.pixels else None
        self._identify(levels)
        units = self._decided(values, levels, kwargs)
        self._call.scratch["packed"] = [len(kept) * self._unit for kept in units]
        kept = torch.cat([unit + start for unit, start in zip(units, self.offsets[:-1], strict=True)])
        order, arguments = self._shortened(kept)
        if len(kept) == self.offsets[-1]:
            output = self.forward(hidden_states, grid_thw=grid_thw, **kwargs)
        else:
            values = hidden_states.unflatten(0, (-1, self._unit))[kept].flatten(0, 1)
            output = self._widened(self.forward(values, grid_thw=grid_thw, **kwargs, **arguments), kept)
        self._back_to_raster(order)
        return output

    def _back_to_raster(self, order: Tensor) -> None:
        """The signals that were read in the tower's own order of units [U], patch by patch in raster order."""
        for key in [key for key in self._call.scratch if isinstance(key, tuple)]:
            signal = self._call.scratch[key].unflatten(0, (-1, self._unit))
            self._call.scratch[key] = self._put(signal, order).flatten(0, 1)

    def _shortened(self, kept: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The kept units in the order in which the tower meets them, and its arguments for them."""
        family, visual, every = self.family, self.tower.module, torch.arange(self._unit, device=kept.device)
        patches = (kept[:, None] * self._unit + every).flatten()
        arguments = {name: value[patches] for name, value in family.kept_arguments(visual, self.grid).items()}
        frames = self.grid[:, 1:].prod(-1).repeat_interleave(self.grid[:, 0])
        there = torch.zeros(self.offsets[-1], dtype=torch.bool, device=kept.device).index_fill_(0, kept, True)
        arguments["cu_seqlens"] = _ends(there, frames.cumsum(0), self._unit)
        windows = family.windows(visual, self.grid)
        if windows is None:
            return kept, arguments
        order = windows[0].to(kept.device)
        arguments["cu_window_seqlens"] = _ends(there[order], windows[1][1:], self._unit)
        order = order[there[order]]
        arguments["window_index"] = torch.searchsorted(kept, order)
        return order, arguments

    def _widened(self, output: Any, kept: Tensor) -> Any:
        """The tower's output with one merged row per unit, zero where it was dropped."""
        alive = self._put(torch.ones_like(kept, dtype=torch.bool), kept)
        self._call.scratch["alive"] = alive.repeat_interleave(self._unit)
        output.pooler_output = self._put(output.pooler_output, kept)
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [self._put(rows, kept) for rows in output.deepstack_features]
        return output

    def _put(self, rows: Tensor, where: Tensor) -> Tensor:
        return rows.new_zeros(self.offsets[-1], *rows.shape[1:]).index_copy_(0, where, rows)

    # -- deciding -------------------------------------------------------------------------------------------------

    def _decided(self, values: Tensor, images: Tensor | None, kwargs: Mapping[str, Any]) -> list[Tensor]:
        units = [
            torch.arange(b - a, device=values.device) for a, b in zip(self.offsets, self.offsets[1:], strict=False)
        ]
        maps = {"embedded": self._embedded_units(values)} if self._at(Stage.VIT) else {}
        for strategy in self._early:
            with self.pruned.judging(strategy) as cut:
                before = [len(kept) for kept in units]
                for image, start in enumerate(self.offsets[:-1]):
                    tokens, signals = self._signals_of(strategy, image, units[image] + start, values, images, maps)
                    number = self._call.batch[image]
                    picture = self._call.images[number]
                    marks, owners = [picture.fingerprint], [(number, 0)]
                    selection = cut.ask(tokens, units[image][None], marks, picture.grid, signals, owners)
                    units[image] = units[image][selection.sources[0]]
                self._note(cut, before, units)
        return units

    def _note(self, cut: Judgement, before: Sequence[int], units: Sequence[Tensor]) -> None:
        for number, count, kept in zip(self._call.batch, before, units, strict=True):
            cut.note(number, count, kept)

    def _signals_of(
        self, strategy: PruningStrategy, image: int, where: Tensor, values: Tensor, images: Any, maps: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if strategy.stage is Stage.PIXELS:
            pixels = self._unit_pixels(images.unflatten(0, (-1, self._unit))[where], bool(self.grid[image, 0] > 1))[
                None
            ]
            return pixels.flatten(2), {"pixels": pixels}
        if "centered" in strategy.needs:
            maps.setdefault("centered", self._embedded_units(self._without_colour(values)))
        signals = {name: maps[name][where][None] for name in ("centered",) if name in maps}
        tokens = maps["embedded"][where][None]
        return tokens, signals | {"positioned": tokens}  # rotary positions are added to no embedding

    def _embedded_units(self, values: Tensor) -> Tensor:
        """Patch embeddings, one unit a row: [S, C] -> [U, b * b * D]."""
        return self.tower.patch_embedding(values).reshape(len(values) // self._unit, -1)

    def _without_colour(self, values: Tensor) -> Tensor:
        channels = values.unflatten(1, (3, -1))
        return (channels - channels.mean(-1, keepdim=True)).flatten(1)

    def _levels(self, values: Tensor) -> Tensor:
        """The uint8 patches behind pixel values [S, 3 * t * p * p] -> [S, 3, t * p, p]."""
        return self.pixels.levels(values.unflatten(1, (3, -1, self.tower.patch_size)))

    def _unit_pixels(self, levels: Tensor, video: bool) -> Tensor:
        """Units as larger patches, [U, b * b, 3, t * p, p] -> [U, 3, b * p, b * p]; video frames stacked."""
        size, b = self.tower.patch_size, self.tower.block
        split = levels.unflatten(1, (b, b)).unflatten(4, (-1, size))  # [U, b, b, 3, t, p, p]
        split = split if video else split[:, :, :, :, :1]
        return split.permute(0, 3, 4, 1, 5, 2, 6).flatten(5, 6).flatten(2, 4)

    def _identify(self, images: Tensor | None) -> None:
        if not self._needing("fingerprint"):
            return
        units = [(b - a) * self._unit for a, b in zip(self.offsets, self.offsets[1:], strict=False)]
        for number, levels in zip(self._call.batch, images.split(units), strict=True):
            self._call.images[number].fingerprint = fingerprint(levels.transpose(0, 1).flatten(2))

    # -- signals --------------------------------------------------------------------------------------------------

    def _row_reader(self, layer: int) -> Callable[..., None]:
        def read(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._active:
                return
            hidden = args[0] if args else kwargs["hidden_states"]  # [S, D], normed
            with torch.no_grad(), self.pruned.timed("selector"):
                query, key, _ = module.qkv(hidden).unflatten(-1, (3, module.num_heads, -1)).unbind(1)  # [S, H, d]
                self._call.scratch["keys", layer] = key.float().mean(1)
                rotate = _function(module, "apply_rotary_pos_emb_vision")
                query, key = rotate(query, key, *kwargs["position_embeddings"])
                rows = received(query, key, kwargs["cu_seqlens"].diff().tolist(), attention.scale(module))
            self._call.scratch["cls_attention", layer] = rows

        return read

    def _projecting(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Rows are judged behind the merger."""

    def _tiles(self, shape: Sequence[int]) -> Tensor:
        """The frame of every patch."""
        return torch.cat([torch.arange(t).repeat_interleave(h * w) for t, h, w in self.grid.tolist()]).float()

    @property
    def _map_shape(self) -> tuple[int, ...]:
        return (self.offsets[-1] * self._unit,)

    @property
    def _unit(self) -> int:
        return self.tower.block**2


def received(query: Tensor, key: Tensor, lengths: Sequence[int], factor: float) -> Tensor:
    """Attention received inside windows of these lengths, one on average in each of them, [S, H, d] twice -> [S]."""
    spans = zip(query.split(lengths), key.split(lengths), strict=True)
    heads = ((q.transpose(0, 1)[None], k.transpose(0, 1)[None]) for q, k in spans)
    return torch.cat([attention.received(q, k, factor)[0] * q.shape[2] for q, k in heads])


def _ends(there: Tensor, ends: Tensor, unit: int) -> Tensor:
    """Cumulative lengths of sequences after a cut: units that are there [U], ends of the full ones in patches."""
    counts = torch.nn.functional.pad(there.long().cumsum(0), (1, 0)) * unit
    shortened = torch.nn.functional.pad(counts[ends.long().to(there.device) // unit], (1, 0))
    return shortened.unique_consecutive().to(torch.int32)


def _function(module: nn.Module, name: str) -> Callable[..., Any]:
    """A function that the module's own file uses."""
    return getattr(sys.modules[type(module).__module__], name)
