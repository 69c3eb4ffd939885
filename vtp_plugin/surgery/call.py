"""The state of one call of the host model (a `generate` or a `forward`), and what is reported of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.facts.image import Image as Image
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.passes import PromptPass, TowerPass
from vtp_plugin.tokens import Selection

CPU = torch.device("cpu")


@dataclass(frozen=True)
class PruningEvent:
    """One cut by one strategy, over the images that were judged together."""

    strategy: str
    stage: Stage
    layer: int | None  # llm stage: the first decoder layer without the dropped tokens; vit: the block that merges
    images: list[int]  # numbers of the images within the call
    before: list[int]  # tokens per image
    after: list[int]
    kept: list[Tensor]  # per image, original raster positions of the survivors, -1 for a token without one; next to
    # the model while its call runs, on the CPU behind it
    seconds: float  # for signals and selection; with measure=True the device is synchronised


@dataclass(frozen=True)
class Decision:
    """One answer of a strategy as it gave it, kept for those who look on."""

    strategy: str
    owners: Sequence[tuple[int, int]]  # per row: image, and what to add to `index` to get a position in that image
    index: Tensor  # [B, N] raster positions of what was judged
    selection: Selection


@dataclass
class Call:
    """Lives from the host's call to its return."""

    images: list[Image] = field(default_factory=list)
    tower: TowerPass | None = None  # while images are in the tower
    waiting: dict[int, TowerPass] = field(default_factory=dict)  # by image, where a projector is asked much later
    prompt: PromptPass = field(default_factory=PromptPass)
    rows: int = 1  # prompts in the batch
    valid: Tensor | None = None  # [B, L] bool: columns of the assembled prompt that are not padding
    positions: Tensor | None = None  # [B, n + 1]: look-up of original positions, see surgery.positions.lookup
    positions_used: bool = False
    cuts: dict[int, Any] = field(default_factory=dict)  # llm stage: what was decided at each decoder layer
    events: list[PruningEvent] = field(default_factory=list)
    wanted: list[tuple[Tensor, Callable[[Tensor], Any]]] = field(default_factory=list)  # see `afterwards`
    device: torch.device = CPU  # where the model computes
    measured: bool = False  # its parts are timed: the clock waits for the device
    seen: list[Any] = field(default_factory=list)  # shapes that passed the tower: metrics.watching.Seen
    counted: dict[Any, Any] = field(default_factory=dict)  # what metrics.counting worked out of these
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by part, see metrics.latency
    running: list[list[Any]] = field(default_factory=list)  # parts that are being timed, the innermost last
    started: float = 0.0  # on the clock of metrics.latency
    first_token: float | None = None  # seconds until the first token was chosen
    passes: int = 0  # through the language model, if timed: the prefill and decoding steps
    columns: int = 0  # of the prompt in the prefill, padding included
    copies: int = 1  # sequences per prompt: beams, returned sequences
    steps: list[tuple[int, int, bool]] = field(default_factory=list)  # decoding, if timed: tokens, those before, cached
    warmup: bool = False  # the first call of a model
    embedded: dict[Any, Any] = field(default_factory=dict)  # questions by shared space: surgery.question.CallQuestions
    decisions: list[Decision] | None = None  # None: nobody looks on
    dropped: int = 0  # columns that the longest prompt is shorter, where the host counts its length
    turn: Any = None  # the prompt and what is left of it: surgery.turns.Turn

    @property
    def batch(self) -> list[int]:
        """The images that are in the tower right now."""
        return [] if self.tower is None else self.tower.batch

    @contextmanager
    def in_tower(self, batch: Sequence[int], **facts: Any) -> Iterator[TowerPass]:
        """These images are being encoded; `facts` are further fields of the pass, which ends with the block."""
        with self.passing(TowerPass(list(batch), **facts)) as tower:
            yield tower

    @contextmanager
    def passing(self, tower: TowerPass) -> Iterator[TowerPass]:
        """This is what the hooks on the tower read and write."""
        before, self.tower = self.tower, tower
        try:
            yield tower
        finally:
            self.tower = before

    @cached_property
    def lengths(self) -> list[int]:
        """Real columns of every prompt that was assembled."""
        return self.valid.sum(1).tolist()

    def afterwards(self, values: Tensor, receive: Callable[[Tensor], Any]) -> None:
        """Call receive(values [n] on the host) when the call has ended; whole numbers or bools."""
        self.wanted.append((values, receive))

    def settle(self) -> None:
        """Hand over everything that was wanted on the host: one wait for each device."""
        wanted, self.wanted = self.wanted, []
        for device in dict.fromkeys(values.device for values, _ in wanted):
            kinds: dict[torch.dtype, list[tuple[Tensor, Callable[[Tensor], Any]]]] = {}  # a device joins one at a time
            for values, receive in wanted:
                if values.device == device:
                    kinds.setdefault(values.dtype, []).append((values, receive))
            there = [one for kind in kinds.values() for one in kind]
            host = torch.cat([torch.cat([values for values, _ in kind]).long() for kind in kinds.values()]).cpu()
            for one, (_, receive) in zip(host.split([len(values) for values, _ in there]), there, strict=True):
                receive(one)

    def spend(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def place(
        self, valid: Tensor, columns: Sequence[Tensor], samples: Sequence[int], lengths: Sequence[int] | None = None
    ) -> None:
        """The prompt was assembled: which columns are real (so many), and where each image's tokens are."""
        self.valid = valid
        if lengths is not None:
            self.lengths = list(lengths)
        for image, where, sample in zip(self.images, columns, samples, strict=True):
            image.columns, image.sample = where, sample
