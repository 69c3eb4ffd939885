"""What the reader of a signal gets to see: one class per place where signals are read. B images, N tokens each.

Images that are read together have equally many tokens. Where the tower takes the patches of all images in one sequence
there is no axis B in a block; shapes say so with "...".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from vtp_plugin.errors import PruningError
from vtp_plugin.facts.tower import SharedSpace, Tower
from vtp_plugin.stages import Stage


def tapped(value: Any, tap: str) -> Any:
    """What a tap keeps; PruningError where a signal reads it without saying so."""
    if value is None:
        raise PruningError(f"a signal reads what is not kept: declare it with taps=Tap.{tap}")
    return value


class View:
    """Where a signal is read."""

    stage: ClassVar[Stage]
    inside: ClassVar[bool] = False  # inside the blocks of the tower, between attention and MLP


@dataclass(frozen=True)
class PatchesView(View):
    """Raw patches."""

    stage = Stage.PIXELS

    pixels: Tensor  # [B, N, 3, p, p] uint8
    fingerprint: tuple[int, ...]  # one per image


@dataclass(frozen=True)
class EmbeddingView(View):
    """Embedded patches, before the first block."""

    stage = Stage.VIT

    positioned: Tensor  # [B, N, D]
    fingerprint: tuple[int, ...]
    uncoloured: Callable[[], Tensor]  # embeds the patches without their mean colour, [B, N, D]

    @cached_property
    def centered(self) -> Tensor:
        """[B, N, D]"""
        return self.uncoloured()


@dataclass(frozen=True)
class MergingView(View):
    """Inside a block of the tower, between its attention and its MLP."""

    stage, inside = Stage.VIT, True

    projected_keys: Tensor  # [B, prefix + N, H d] keys of this block
    width: int  # d
    prefix: int
    sizes: Tensor  # [B, N] fp32
    hidden: Tensor  # [B, prefix + N, D]
    fingerprint: tuple[int, ...]


@dataclass(frozen=True)
class BlockView(View):
    """Where a block of the tower begins. What is read here follows the patches to the projector."""

    stage = Stage.PROJECTOR

    keys: Tensor  # [..., H, N, d] before rotation
    query: Tensor | None  # [B, H, d] of the class token, None where there is none
    attend: Callable[[], Tensor]
    class_key: Tensor | None = None  # [B, H, d] of the class token
    receive: Callable[[], Tensor] | None = None  # None: as `attend`
    project_values: Callable[[], Tensor] | None = None  # [..., H, N, d]

    @cached_property
    def received(self) -> Tensor:
        """[..., N] fp32: the attention that a patch receives, mean over heads and all queries."""
        return self.attention if self.receive is None else self.receive()

    @property
    def values(self) -> Tensor:
        """[..., H, N, d]"""
        if self.project_values is None:
            raise PruningError("a signal reads the values of the tower, this host does not show them")
        return self.project_values()

    @cached_property
    def attention(self) -> Tensor:
        """[..., N] fp32: of the class token; without one, what a patch receives, mean over queries. Mean over heads."""
        return self.attend()


class RowsView(View, ABC):
    """Tokens in front of the projector, or rows behind it."""

    stage = Stage.PROJECTOR

    tower: Tower
    device: torch.device
    embedded: bool  # questions are compared in the language model's own space (text_encoder=llm)
    fingerprint: tuple[int, ...]

    @property
    @abstractmethod
    def block(self) -> int:
        """The tower's block `tower_layer`."""

    @property
    @abstractmethod
    def projected(self) -> Tensor:
        """What the projector makes of the tokens, [B, N, L]."""

    @property
    @abstractmethod
    def space(self) -> SharedSpace:
        """Where patches and questions are compared."""

    @property
    @abstractmethod
    def questions(self) -> Sequence[str]:
        """One per image."""

    @abstractmethod
    def output(self, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """The output of block `tower_layer` put through `make`, token by token: [..., D] -> [B, N, E].

        `name` is that of the signal; what `make` makes is kept under it.
        """

    @property
    @abstractmethod
    def class_feature(self) -> Tensor | None:
        """The class token where the tokens come from, [B, D]; None where there is none in their space."""

    @property
    def units(self) -> Tensor:
        """What goes into the merger, unit by unit, [B, N, m D]; only where a family merges patches."""
        raise PruningError("nothing is merged into these tokens")

    @property
    def film(self) -> tuple[int, int, int]:
        """Frames, and rows and columns of the tokens of each; a picture is one frame. Where a family takes videos."""
        raise PruningError("this model takes no videos")

    @property
    def frame(self) -> Tensor:
        """[B, N] long"""
        raise PruningError("this model takes no videos")

    @property
    def cell(self) -> Tensor:
        """[B, N, 2] long: row and column in the frame."""
        raise PruningError("this model takes no videos")

    @property
    def view(self) -> Tensor | None:
        """[B, N] long, of images with several views."""
        return None

    @property
    def place(self) -> Tensor | None:
        """[B, N, 2] fp32, of images with several views."""
        return None


class Reading(Protocol):
    """The attention of one decoder layer; rows are recomputed one by one. L columns of the prompt."""

    def last_row(self) -> Tensor:
        """Of the last real column, mean over heads, [B, L]."""

    def rows(self, sample: int, columns: Tensor) -> Tensor:
        """Of some columns [T], mean over heads, [T, L]."""

    def head_rows(self, sample: int, columns: Tensor) -> Tensor:
        """The same of every head, [H, T, L]."""

    def rotary_bias(self, sample: int, columns: Tensor) -> Tensor:
        """Logits of all-ones queries and keys, [T, L]."""

    def strongest(self, sample: int, columns: Tensor) -> Tensor:
        """Of some columns, max over heads, sum over the columns, [L]."""

    def norms(self, sample: int) -> Tensor:
        """L1 norms of the keys, heads side by side, [L]."""

    def values(self, sample: int, columns: Tensor) -> Tensor:
        """Of some columns [N], of every query head, [H, N, d]."""

    def outputs(self, sample: int, columns: Tensor) -> Tensor:
        """What attention makes of the values for some columns [T], [H, T, d]."""


@dataclass(frozen=True)
class LayerView(View):
    """One image between two decoder layers: a reader answers without the axis B."""

    stage = Stage.LLM

    before: Reading | None  # the layer before the cut; None without the tap LAYER
    behind: Callable[[], Reading]  # the layer behind the cut, as if nothing were cut
    embeddings: Tensor | None  # [B, L, D] of the prompt; None without the tap ENTRY
    hidden: Tensor  # [B, L', D] hidden states at the cut
    norm: Callable[[Tensor], Tensor]  # the language model's final one
    sample: int  # row of the batch
    image: Tensor  # [N] columns of the image among the L'
    find_text: Callable[[], Tensor]  # answers with `text`
    first: Tensor  # [M] columns of the whole prompt, of the tokens that the strategy saw first
    columns: Tensor  # [L'] columns of the whole prompt
    fingerprint: tuple[int, ...]  # of this image

    @cached_property
    def text(self) -> Tensor:
        """Columns of the text behind the image among the L', [T]; looked for where a signal reads it."""
        return self.find_text()

    @property
    def words(self) -> Tensor:
        """Columns of the whole prompt, of that text, [T]."""
        return self.columns[self.text]

    @property
    def reading(self) -> Reading:
        """The attention of the layer before the cut."""
        return tapped(self.before, "LAYER")

    @property
    def entry(self) -> Tensor:
        """The embeddings of the prompt, [B, L, D]."""
        return tapped(self.embeddings, "ENTRY")


VIEWS: tuple[type[Any], ...] = (PatchesView, EmbeddingView, MergingView, BlockView, RowsView, LayerView)
