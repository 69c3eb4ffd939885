"""Cuts in families whose host rearranges the tower's output: tiles with newlines, pixel shuffle, merging, pooling.

From outside, the tower looks unpruned: tokens that a pixels- or vit-stage strategy dropped come out as zeros, so that
the host's own arrangement into rows runs as ever. Then rows are taken out: those of dropped tokens, and those that
projector- stage strategies drop. Which tokens a row is made of is never computed twice: signals travel through the
host's own arrangement as extra channels (`arrange`), so a row of several tokens gets the mean of their signals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from vtp_plugin.adapter import Tower
from vtp_plugin.errors import PruningError
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.call import VIEW_SIGNALS
from vtp_plugin.surgery.pixels import fingerprint, patches
from vtp_plugin.surgery.prompt import Rows
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.surgery.vision import VisionCuts, behind_projector, space_of

if TYPE_CHECKING:
    from vtp_plugin.pruning import Judgement, Pruned

MIXED = 0.02  # the variance of token numbers within a row that is made of several
WHOLE = 1e-4  # a row whose tokens are all left has this much of them missing at most


class Arranging(Protocol):
    """What a family tells about the way from tower tokens to rows of the prompt."""

    tower: Tower
    projector: nn.Module
    tokenwise: bool  # the projector works token by token: a strategy sees tower features, not projected rows,
    # unless the host interpolates the projected ones

    def arrange(self, maps: Tensor, kind: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Channels of the tower's tokens, [T, N, C] or [S, C], as the host arranges features: per image [n, C].

        A row that is made of no token (a newline) is nan.
        """


@dataclass
class Part:
    """The rows of one image that a projector-stage strategy may still drop."""

    number: int  # of the image within the call
    source: Tensor  # [k] long: row among those that the host makes, -1 for a merged one that is none of them
    tokens: Tensor  # [k, D]
    features: Tensor  # [k, D']
    tile: Tensor  # [n]: tile of every row that the host makes, no whole number where it is made of several
    fixed: Tensor  # [m] long: rows that are always kept

    def become(self, pieces: Sequence[Sequence[Tensor]]) -> None:
        """Take over what the decisions about all of the rows left."""
        if pieces:
            self.source, self.tokens, self.features = (torch.cat(column) for column in zip(*pieces, strict=True))


class TileCuts(VisionCuts):
    """The cuts of one tower whose rows are tiles of images."""

    shared_budgets = (Stage.PROJECTOR,)

    def __init__(self, pruned: Pruned, family: Arranging) -> None:
        super().__init__(pruned, family.tower, family.projector)
        self.family = family
        self.columns: Tensor | None = None  # [B, K] patches that the tower's embeddings shall keep

    def install(self, undo: Undo) -> None:
        if self._early or self._needing("fingerprint"):
            self.forward = undo.override(self.tower.module, "forward", self._tower)
        if self._early:
            self._install_gather(undo)
        if self._at(Stage.VIT):
            undo.after(self.tower.patch_embedding, self._patches_embedded)
        self._install_readers(undo)
        if self._at(Stage.PROJECTOR):
            undo.before(self.projector, self._projecting)

    def prepare(self) -> None:
        super().prepare()
        for strategy in self._early:
            if strategy.keep_tokens is not None and strategy.budget != "per_tile":
                raise strategy.error(
                    f"at the {strategy.stage.value} stage keep_tokens counts per tile here: say budget=per_tile, "
                    f"or give keep_ratio"
                )

    def _read_blocks(self) -> set[int]:
        first = self.pruned.adapter.several_views and self._needing("first_attention")
        return super()._read_blocks() | ({0} if first else set())

    def lacking(self, strategy: PruningStrategy) -> str:
        if "class_query" in strategy.needs and self.tower.prefix:
            return f"it needs one class token per image, {self.pruned.adapter.models} has one per tile"
        return super().lacking(strategy)

    def _unmergeable(self, strategy: PruningStrategy) -> str:
        models = self.pruned.adapter.models
        return f"merging inside the blocks is not possible, {models} arranges the tower's tokens by their places"

    def _install_gather(self, undo: Undo) -> None:
        undo.after(self.tower.embeddings, self._gather)

    # -- pixels and vit -------------------------------------------------------------------------------------------

    def _tower(self, *args: Any, **kwargs: Any) -> Any:
        if not self._active:
            return self.forward(*args, **kwargs)
        values = args[0] if args else kwargs["pixel_values"]
        images = self.pixels.images(values) if self.pixels else None
        self._identify(images)
        units = self._decided(values, images, kwargs)
        if all(len(kept) == len(self.members) for kept in units):
            return self.forward(*args, **kwargs)
        return self._in_groups(units, args, kwargs)

    def _decided(self, values: Tensor, images: Tensor | None, kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The units that are left of every tile."""
        units = [torch.arange(len(self.members), device=values.device)] * len(values)
        if not self._early:
            return units
        embedded = self._embed(values, kwargs)
        for strategy in self._early:
            with self.pruned.judging(strategy) as cut:
                before = [len(kept) for kept in units]
                for group in _alike(units):
                    self._decide_tiles(cut, group, units, (values, images, embedded))
                self._note(cut, before, units)
        return units

    def _decide_tiles(self, cut: Judgement, group: list[int], units: list[Tensor], seen: tuple[Any, ...]) -> None:
        """One decision about tiles with equally many units; `units` is updated."""
        index = torch.stack([units[tile] for tile in group])  # [G, U]
        tokens, signals = self._unit_signals(cut.strategy, group, index, *seen)
        marks = [self._call.scratch["fingerprints"][tile] for tile in group] if self.pixels else [0] * len(group)
        selection = cut.ask(tokens, index, marks, self._unit_grid, signals, [self._owner(tile) for tile in group])
        for tile, columns in zip(group, selection.sources, strict=True):
            units[tile] = units[tile][columns]

    def _owner(self, tile: int) -> tuple[int, int]:
        """The image of a tile, and how many units its earlier tiles have."""
        owners = self._call.scratch["owners"]
        return owners[tile], (tile - owners.index(owners[tile])) * len(self.members)

    def _unit_signals(
        self, strategy: PruningStrategy, group: list[int], index: Tensor, values: Tensor, images: Any, embedded: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Tokens [G, U, D] and signals of units; a unit of several patches is their concatenation, one larger patch."""
        if strategy.stage is Stage.PIXELS:
            size = self.tower.patch_size * self.tower.block
            pixels = attention.take(patches(images[group], size), index)
            return pixels.flatten(2), {"pixels": pixels}
        columns = self.members[index].flatten(1)  # [G, U * b * b]
        maps = {"tokens": self._call.scratch["embedded"][group], "positioned": embedded[group][:, self.tower.prefix :]}
        signals = {name: attention.take(m, columns).unflatten(1, (*index.shape[1:], -1)) for name, m in maps.items()}
        if "centered" in strategy.needs:
            signals["centered"] = self._centered(values[group], columns).unflatten(1, (*index.shape[1:], -1))
        signals = {name: value.flatten(2) for name, value in signals.items()}
        return signals.pop("tokens"), signals

    def _embed(self, values: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        return self.tower.embeddings(values) if self._at(Stage.VIT) else None

    def _note(self, cut: Judgement, before: Sequence[int], units: Sequence[Tensor]) -> None:
        """Report by image; units of later tiles are counted on."""
        seen: dict[int, int] = {}
        for owner, count, kept in zip(self._call.scratch["owners"], before, units, strict=True):
            cut.note(owner, count, kept + seen.get(owner, 0) * len(self.members))
            seen[owner] = seen.get(owner, 0) + 1

    def _in_groups(self, units: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
        """Run the tower on tiles of equal lengths together; its output at full length, zero where nothing is left."""
        runs = []
        for group in _alike(units):
            self.columns = self.members[torch.stack([units[tile] for tile in group])].flatten(1).sort(-1).values
            self._call.scratch["running"] = [self._call.scratch["owners"][tile] for tile in group]
            try:
                output = self.forward(*_rows_of(args, group, len(units)), **_rows_of(kwargs, group, len(units)))
                runs.append((group, self.columns, output, self._taken_signals()))
            finally:
                self.columns = None
                del self._call.scratch["running"]
        spread = _Spread(len(units), self._patches, self.tower.prefix, [run[:2] for run in runs])
        for key in runs[0][3]:
            self._call.scratch[key] = spread([run[3][key] for run in runs])
        alive = spread([columns.new_ones(columns.shape, dtype=torch.bool) for _, columns, *_ in runs])
        self._call.scratch["alive"] = alive
        first = runs[0][2]
        return type(first)({name: spread([run[2][name] for run in runs]) for name in first.keys()})  # noqa: SIM118

    def _gather(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if self.columns is None:
            return None
        prefix = self.tower.prefix
        return torch.cat([output[:, :prefix], attention.take(output, self.columns + prefix)], dim=1)

    def _taken_signals(self) -> dict[Any, Tensor]:
        keys = [key for key in self._call.scratch if isinstance(key, tuple)]
        return {key: self._call.scratch.pop(key) for key in keys}

    def _identify(self, images: Tensor | None) -> None:
        if self.pixels is None:
            return
        marks = [fingerprint(image) for image in images] if self._needing("fingerprint") else [0] * len(images)
        self._call.scratch["fingerprints"] = marks
        for owner, mark in zip(reversed(self._call.scratch["owners"]), reversed(marks), strict=True):
            self._call.images[owner].fingerprint = mark  # that of the first tile

    # -- projector ------------------------------------------------------------------------------------------------

    def _projecting(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._active:
            self._call.scratch["features"] = args[0]

    def rows(self, features: Sequence[Tensor], kind: str, inputs: Mapping[str, Any]) -> list[tuple[Tensor, Rows]]:
        """What is left of the rows that the host made of the images in the tower."""
        self.kind, self.inputs = kind, inputs
        self.arranged: dict[Any, list[Tensor]] = {}
        self.tokenwise = self.family.tokenwise and bool(self._at(Stage.PROJECTOR)) and self._one_token_a_row()
        parts = self._parts(features)
        for strategy in self._at(Stage.PROJECTOR):
            with self.pruned.judging(strategy) as cut:
                before = [len(part.source) for part in parts]
                pieces = [piece for group in self._groups(strategy, parts) for piece in self._decide_rows(cut, group)]
                for part in parts:
                    part.become([rest for owner, *rest in pieces if owner is part])
                for part, count in zip(parts, before, strict=True):
                    cut.note(part.number, count, part.source)
        return [self._finished(part, rows) for part, rows in zip(parts, features, strict=True)]

    def _parts(self, features: Sequence[Tensor]) -> list[Part]:
        layout = self._layout()
        tokens: Sequence[Tensor] = features
        if self.tokenwise:
            tokens = self._arranged("features", self._call.scratch["features"])
        parts = []
        for number, rows, seen, (alive, tile) in zip(self._call.batch, features, tokens, layout, strict=True):
            newline = alive.isnan()
            broken = ~newline & (alive > WHOLE) & (alive < 1 - WHOLE)
            if broken.any():
                raise PruningError(
                    f"{self._early[0].name}: the model interpolates the tower's output of this {self.kind}, so no "
                    f"patch can be dropped before: use a strategy of the projector or llm stage"
                )
            source = (~newline & (alive > 0.5)).nonzero().flatten()
            parts.append(Part(number, source, seen[source], rows[source], tile, newline.nonzero().flatten()))
        return parts

    def _one_token_a_row(self) -> bool:
        """Whether the host takes tokens as they are; one that interpolates would have projected them before."""
        numbers = torch.arange(math.prod(self._map_shape), device=self.pruned.device).view(self._map_shape) % 251.0
        maps = torch.stack([numbers, numbers**2], dim=-1)
        means = [rows.unbind(-1) for rows in self.family.arrange(maps, self.kind, self.inputs)]
        return not any((square - mean**2 > MIXED).any() for mean, square in means)

    def _layout(self) -> list[tuple[Tensor, Tensor]]:
        """Per image and row: the share of its tokens that is left (nan for a newline), and its tile."""
        alive = self._call.scratch.get("alive")
        if alive is None:
            alive = torch.ones(self._map_shape, dtype=torch.bool, device=self.pruned.device)
        maps = torch.stack([alive.float(), self._tiles(alive.shape).to(alive.device)], dim=-1)
        return [rows.unbind(-1) for rows in self.family.arrange(maps, self.kind, self.inputs)]

    def _tiles(self, shape: Sequence[int]) -> Tensor:
        """Number of the tile within its image, as a map."""
        owners = torch.tensor(self._call.scratch["owners"])
        first = torch.cat([owners.new_zeros(1), (owners[1:] != owners[:-1]).long()]).cumsum(0)
        starts = torch.searchsorted(first, first)
        return (torch.arange(len(owners)) - starts).float()[:, None].expand(tuple(shape))

    @property
    def _map_shape(self) -> tuple[int, ...]:
        return len(self._call.scratch["owners"]), self._patches

    def _groups(self, strategy: PruningStrategy, parts: Sequence[Part]) -> list[list[tuple[Part, Tensor]]]:
        """The rows that share one budget: lists of parts with the positions within their rows."""
        everything = [(part, torch.arange(len(part.source), device=part.source.device)) for part in parts]
        if strategy.budget == "per_image":
            return [[one] for one in everything if len(one[1])]
        if strategy.budget == "per_tile":
            tiles = [(part, part.tile[part.source]) for part in parts]
            if any((of != of.round()).any() for _, of in tiles):
                raise strategy.error(
                    f"budget=per_tile needs whole tiles, the model interpolates across those of this {self.kind}"
                )
            return [[(part, (of == tile).nonzero().flatten())] for part, of in tiles for tile in of.unique()]
        samples = [self._call.images[part.number].sample for part in parts]
        return [[one for one, s in zip(everything, samples, strict=True) if s == sample] for sample in set(samples)]

    def _decide_rows(self, cut: Judgement, group: list[tuple[Part, Tensor]]) -> list[tuple[Part, Tensor, ...]]:
        """One decision about rows of one or several images: per part source, tokens and features of what is left."""
        tokens = torch.cat([part.tokens[where] for part, where in group])
        features = torch.cat([part.features[where] for part, where in group])
        owner = torch.cat([torch.full_like(where, n) for n, (_, where) in enumerate(group)])
        source = torch.cat([part.source[where] for part, where in group])
        image = self._call.images[group[0][0].number]
        offset = torch.tensor([0, *(self._call.images[part.number].total for part, _ in group)]).cumsum(0)
        index = source + offset.to(source.device)[owner]
        grid = image.grid if image.grid and len(group) == 1 else (1, int(offset[-1]))
        names = [name for name in cut.strategy.needs if name != "fingerprint"]
        signals = {name: self._row_signal(name, cut.strategy, group) for name in names}
        owners = [(group[0][0].number, 0)] if len(group) == 1 else ()
        views = {"views": image.views} if signals.get("view") is not None else {}
        selection = cut.ask(tokens[None], index[None], [image.fingerprint], grid, signals, owners, **views)
        chosen = selection.sources[0]
        tokens = selection.apply(tokens[None])[0]
        if selection.tokens is None:
            features = features[chosen]
        else:
            features = self.projector(tokens[None])[0] if self.tokenwise else tokens
        source = torch.where(chosen >= 0, source[chosen.clamp(min=0)], -1)
        owner = torch.where(chosen >= 0, owner[chosen.clamp(min=0)], 0)
        left = [owner == number for number in range(len(group))]
        return [(part, source[m], tokens[m], features[m]) for (part, _), m in zip(group, left, strict=True)]

    def _row_signal(self, name: str, strategy: PruningStrategy, group: list[tuple[Part, Tensor]]) -> Tensor | None:
        """One field of VisualTokens for the rows of a group, [1, N, ...]."""
        layer, scratch = self._layer(strategy), self._call.scratch
        if name in VIEW_SIGNALS:
            return self._view_signal(name, strategy, group)
        if name == "heads":
            return self._heads(layer)
        if name == "projected":
            return torch.cat([part.features[where] for part, where in group])[None]
        if name == "cls":
            return self._class_feature(group[0][0].number)
        if name == "text":
            question = self._call.images[group[0][0].number].question
            return self.spaces[space_of(strategy)].text([question]).to(self.pruned.device)
        if name in behind_projector(strategy):
            return torch.cat([part.features[where] for part, where in group])[None]
        if name == "aligned":
            hidden = scratch["output", layer][:, self.tower.prefix :]
            maps = self.spaces[space_of(strategy)].patches(self.tower.post_layernorm(hidden))
            rows = self._arranged((name, layer, *space_of(strategy)), maps)
        else:
            rows = self._arranged((name, layer), scratch[name, layer])
        order = {number: n for n, number in enumerate(self._call.batch)}
        return torch.cat([rows[order[part.number]][part.source[where]] for part, where in group])[None]

    def _view_signal(self, name: str, strategy: PruningStrategy, group: list[tuple[Part, Tensor]]) -> Tensor | None:
        """Where the rows of one image come from, [1, N, ...]; None for a single view and for several images."""
        (part, where), *others = group
        if others or strategy.budget == "per_tile" or self._call.images[part.number].views is None:
            return None
        source = part.source[where]
        if name == "view":
            if (part.tile[source] != part.tile[source].round()).any():
                raise strategy.error(f"it needs whole tiles, the model interpolates across those of this {self.kind}")
            return part.tile[source].long()[None]
        if name == "place":
            rows = self._arranged(name, self._middles.expand(*self._map_shape, 2))
        else:
            rows = self._arranged(("cls_attention", 0), self._call.scratch["cls_attention", 0])
        return rows[self._call.batch.index(part.number)][source][None]

    @property
    def _middles(self) -> Tensor:
        """The middle of every patch of a tile, [N, 2] in (0, 1)."""
        down, across = ((torch.arange(n, device=self.pruned.device) + 0.5) / n for n in self.tower.grid)
        return torch.cartesian_prod(down, across)

    def _class_feature(self, number: int) -> Tensor | None:
        """The class token of the image's first tile, [1, D], where it lives in the space of the tokens."""
        if not self.tower.prefix or not self.tokenwise:
            return None
        return self._call.scratch["output", self._block(None)][self._call.scratch["owners"].index(number), :1]

    def _arranged(self, key: Any, maps: Tensor) -> list[Tensor]:
        """A signal of the tower's tokens as rows of the prompt, per image [n] or [n, D]."""
        if key not in self.arranged:
            flat = maps[..., None] if maps.ndim == len(self._map_shape) else maps
            rows = self.family.arrange(flat, self.kind, self.inputs)
            self.arranged[key] = [r[..., 0] for r in rows] if flat.ndim > maps.ndim else list(rows)
        return self.arranged[key]

    def _finished(self, part: Part, rows: Tensor) -> tuple[Tensor, Rows]:
        """The rows of an image that enter the prompt, in the order of the host where nothing was merged."""
        image = self._call.images[part.number]
        image.index, image.fixed = part.source, len(part.fixed)
        image.entered = len(part.source) + len(part.fixed)
        source = torch.cat([part.source, part.fixed])
        features = torch.cat([part.features, rows[part.fixed].to(part.features)])
        judged = torch.arange(len(source), device=source.device) < len(part.source)
        if len(part.fixed) or (part.source >= 0).all():
            order = source.sort(stable=True).indices
            source, features, judged = source[order], features[order], judged[order]
            image.index = source[judged]
        return features, Rows(source, judged)

    # -- small things ---------------------------------------------------------------------------------------------

    @property
    def _early(self) -> list[PruningStrategy]:
        return self._at(Stage.PIXELS) + self._at(Stage.VIT)

    @property
    def _patches(self) -> int:
        return self.tower.grid[0] * self.tower.grid[1]

    @property
    def _unit_grid(self) -> tuple[int, int]:
        return self.tower.grid[0] // self.tower.block, self.tower.grid[1] // self.tower.block

    @cached_property
    def members(self) -> Tensor:
        """The patches of every unit, [U, b * b]."""
        (rows, columns), b = self._unit_grid, self.tower.block
        raster = torch.arange(self._patches, device=self.pruned.device).view(rows, b, columns, b)
        return raster.transpose(1, 2).reshape(-1, b * b)


class _Spread:
    """Puts the outputs of runs on groups of tiles back to all tiles and all patches, zero where nothing was run."""

    def __init__(self, tiles: int, total: int, prefix: int, runs: Sequence[tuple[list[int], Tensor]]) -> None:
        self.tiles, self.total, self.prefix, self.runs = tiles, total, prefix, runs

    def __call__(self, parts: Sequence[Any]) -> Any:
        if isinstance(parts[0], tuple):
            return tuple(self(part) for part in zip(*parts, strict=True))
        if parts[0] is None:
            return None
        kept = self.runs[0][1].shape[1]
        prefix = parts[0].shape[1] - kept if parts[0].ndim > 1 else -1
        if prefix not in (0, self.prefix) or parts[0].ndim not in (2, 3):  # one entry per tile
            full = parts[0].new_zeros(self.tiles, *parts[0].shape[1:])
            for (group, _), part in zip(self.runs, parts, strict=True):
                full[group] = part
            return full
        full = parts[0].new_zeros(self.tiles, prefix + self.total, *parts[0].shape[2:])
        for (group, columns), part in zip(self.runs, parts, strict=True):
            tile = torch.tensor(group, device=columns.device)[:, None]
            full[tile, columns + prefix] = part[:, prefix:]
            full[group, :prefix] = part[:, :prefix]
        return full


def _alike(units: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the tiles with equally many units."""
    sizes = [len(kept) for kept in units]
    return [[n for n, size in enumerate(sizes) if size == one] for one in dict.fromkeys(sizes)]


def _rows_of(arguments: Any, group: list[int], tiles: int) -> Any:
    """The arguments of a tower for some of its tiles."""
    if isinstance(arguments, Mapping):
        return {name: _rows_of((value,), group, tiles)[0] for name, value in arguments.items()}
    return tuple(a[group] if isinstance(a, Tensor) and a.ndim and len(a) == tiles else a for a in arguments)
