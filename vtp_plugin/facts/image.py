"""One image on its way through a model: what the host makes of it, and what is left."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Image:
    """One image on its way through the model."""

    total: int  # tokens that the host makes of it without pruning
    index: Tensor  # [n] raster positions of the tokens that are left, -1 for one that has none
    ordered: bool = True  # they are tokens of the host's, in its order: nothing was merged
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
    film: tuple[int, int, int] | None = None  # of a video: frames, and rows and columns of the tokens of each
    views: tuple[int, int] | None = None  # rows and columns of its sub-images, where a picture of the whole is first
    source: Tensor | None = None  # [k] long: which of the host's rows are left, where a family has to remember it
    judged: Tensor | None = None  # [k] bool: which of those a strategy may drop
    fixed: int = 0  # tokens among `total` that are always kept: newline rows

    @property
    def counted(self) -> bool:
        """False for an image that only a prompt without a place for it consumed."""
        return self.columns is None or len(self.columns) > 0
