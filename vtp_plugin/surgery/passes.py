"""What is remembered on the way through a model: one typed object per pass of its tower, one per call for its prompt.

The hooks write into them and the decisions read from them; nothing is kept on an adapter or on a cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vtp_plugin.tokens import Selection


@dataclass
class Merged:
    """How far merging inside the blocks has come."""

    sizes: Tensor  # [B, N] fp32: patches that every token stands for
    entered: int  # tokens before the first merge
    keys: Tensor | None = None  # [B, prefix + N, H d] of the block that is running
    selection: Selection | None = None  # of the block that is running
    before: Tensor | None = None  # sizes before that selection


@dataclass
class TowerPass:
    """One pass of images through a vision tower. Maps hold one entry per patch of the tower."""

    batch: list[int]  # numbers of the images
    owners: list[int] = field(default_factory=list)  # image of every tile; empty: one tile per image
    kind: str = "image"  # or video
    inputs: Mapping[str, Any] = field(default_factory=dict)  # the host's arguments
    values: Tensor | None = None  # pixel values
    grid: Tensor | None = None  # packed towers: frames, rows and columns of patches of every image [B, 3]
    offsets: list[int] = field(default_factory=list)  # packed towers: where the units of every image begin, and the end
    fingerprints: list[int] = field(default_factory=list)  # one per tile
    embedded: Tensor | None = None  # [B, N, D] patch embeddings
    columns: Tensor | None = None  # [B, K] patches that the embeddings shall keep
    lengths: list[int] = field(default_factory=list)  # towers of one sequence: patches of every image
    sequences: list[tuple[Tensor, list[int]]] = field(default_factory=list)  # packed towers: ends of sequences, lengths
    packed: list[int] | None = None  # packed towers: patches that are left of every image
    places: Tensor | None = None  # packed towers with a table of positions: its entries, unit by unit [U, b * b]
    alive: Tensor | None = None  # map, bool: the patches that are left; None: all
    maps: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # signals by name and block
    whole: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # the same of signals with one entry per tile
    outputs: dict[int, Tensor] = field(default_factory=dict)  # of blocks, [B, prefix + N, D]
    key_weights: Tensor | None = None  # [B, 1, prefix + N]: added to the logits of merged keys
    merged: Merged | None = None  # None: nothing merges inside the blocks
    features: Tensor | None = None  # what goes into the projector
    arranged: Any = None  # surgery.arrangement.Arrangement, once something goes into the projector

    def part(self, tiles: list[int], columns: Tensor) -> TowerPass:
        """A pass of some of the tiles that keeps these patches of them."""
        owners = [self.owners[tile] for tile in tiles]
        return replace(self, owners=owners, columns=columns, maps={}, whole={}, outputs={}, arranged=None)

    def of_image(self, number: int) -> TowerPass:
        """What was read of one of the images, of one tile each."""
        place = self.batch.index(number)
        read = {kind: getattr(self, kind) for kind in ("maps", "whole", "outputs")}
        own = {kind: {key: value[place : place + 1] for key, value in found.items()} for kind, found in read.items()}
        return TowerPass([number], **own)

    @property
    def tiles(self) -> list[int]:
        """The image of every tile."""
        return self.owners or self.batch


@dataclass
class PromptPass:
    """What decoder layers share in a call."""

    entry: Tensor | None = None  # [B, L, D] embeddings of the prompt
    readings: dict[int, Any] = field(default_factory=dict)  # attention of the layer before a cut, until it is decided
    words: dict[int, Tensor] = field(default_factory=dict)  # by row: columns of the text behind its images
    remembered: dict[str, list[tuple[Any, Any, Any]]] = field(default_factory=dict)

    def once(self, name: str, key: tuple[Any, ...], source: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes of `source`, remembered for the other decoder layers of the same pass."""
        known_values = self.remembered.setdefault(name, [])
        for known, of, value in known_values:
            if of is source and known == key:
                return value
        known_values[:] = [*known_values[-7:], (key, source, make())]
        return known_values[-1][2]
