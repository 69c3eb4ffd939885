"""The state of one call of the host model (a `generate` or a `forward`), and what is reported of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.stages import Stage
from vtp_plugin.tokens import Selection

ROW_SIGNALS = ("cls_attention", "keys", "raw_keys", "class_query", "class_key")  # read where a block's attention begins
VIEW_SIGNALS = ("view", "place", "first_attention")  # of images with several views


@dataclass
class Image:
    """One image on its way through the model."""

    total: int  # tokens that the host makes of it without pruning
    index: Tensor  # [n] raster positions of the tokens that are left, -1 for one that has none
    question: str = ""
    fingerprint: int = 0
    sample: int = 0  # row of the batch
    columns: Tensor | None = None  # [n] columns of the prompt that hold the tokens, once it is assembled
    entering: dict[str, Tensor] = field(default_factory=dict)  # llm stage: the columns that a strategy saw first
    kind: str = "image"  # or video
    token: int | None = None  # placeholder id, where the family has several
    tiles: int = 1  # sequences that the tower makes of it
    patches: int | None = None  # tokens of all tiles in the tower, where they are not the tokens of the prompt
    grid: tuple[int, int] | None = None  # rows and columns of its tokens, where they are not the tower's
    projectable: int = 0  # tokens that the projector sees, where `patches` is given
    entered: int | None = None  # tokens that entered the prompt, where events do not tell
    views: tuple[int, int] | None = None  # rows and columns of its sub-images, where a picture of the whole is first
    fixed: int = 0  # tokens among `total` that are always kept: newline rows

    @property
    def counted(self) -> bool:
        """False for an image that only a prompt without a place for it consumed."""
        return self.columns is None or len(self.columns) > 0


@dataclass(frozen=True)
class PruningEvent:
    """One cut by one strategy, over the images that were judged together."""

    strategy: str
    stage: Stage
    layer: int | None  # llm stage: the first decoder layer without the dropped tokens; vit: the block that merges
    images: list[int]  # numbers of the images within the call
    before: list[int]  # tokens per image
    after: list[int]
    kept: list[Tensor]  # per image, original raster positions of the survivors, -1 for a token without one
    seconds: float  # for signals and selection, device synchronised


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
    batch: list[int] = field(default_factory=list)  # the images that are in the tower right now
    scratch: dict[Any, Any] = field(default_factory=dict)  # signals on their way from a hook to a decision
    rows: int = 1  # prompts in the batch
    valid: Tensor | None = None  # [B, L] bool: columns of the assembled prompt that are not padding
    positions: Tensor | None = None  # [B, n + 1]: look-up of original positions, see surgery.positions.lookup
    positions_used: bool = False
    cuts: dict[int, Any] = field(default_factory=dict)  # llm stage: what was decided at each decoder layer
    events: list[PruningEvent] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)  # shapes that passed the tower: metrics.counting.Seen
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by part, see metrics.latency
    running: list[list[Any]] = field(default_factory=list)  # parts that are being timed, the innermost last
    started: float = 0.0  # on the clock of metrics.latency
    first_token: float | None = None  # seconds until the first token was chosen
    passes: int = 0  # through the language model, if timed: the prefill and decoding steps
    columns: int = 0  # of the prompt in the prefill, padding included
    copies: int = 1  # sequences per prompt: beams, returned sequences
    steps: list[tuple[int, int, bool]] = field(default_factory=list)  # decoding, if timed: tokens, those before, cached
    warmup: bool = False  # the first call of a model
    decisions: list[Decision] | None = None  # None: nobody looks on

    @contextmanager
    def in_tower(self, batch: Sequence[int]) -> Iterator[None]:
        """These images are being encoded."""
        self.batch = list(batch)
        try:
            yield
        finally:
            self.batch = []
            self.scratch.clear()

    def once(self, name: str, key: tuple[Any, ...], source: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes of `source`, remembered for the other decoder layers of the same pass."""
        made = self.scratch.setdefault(f"once {name}", [])
        for known, of, value in made:
            if of is source and known == key:
                return value
        made[:] = [*made[-7:], (key, source, make())]
        return made[-1][2]

    def spend(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def place(self, valid: Tensor, columns: Sequence[Tensor], samples: Sequence[int]) -> None:
        """The prompt was assembled: which columns are real, and where each image's tokens are."""
        self.valid = valid
        for image, where, sample in zip(self.images, columns, samples, strict=True):
            image.columns, image.sample = where, sample

    @property
    def index(self) -> Tensor:
        """Raster positions of the images in the tower, [B, N]."""
        return torch.stack([self.images[i].index for i in self.batch])
