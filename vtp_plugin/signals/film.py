"""The signals of a video: which frame a token is of, and where in it. A picture is a video of one frame."""

from __future__ import annotations

from torch import Tensor

from vtp_plugin.facts.family import Family
from vtp_plugin.signals.declaration import Asking, signal
from vtp_plugin.signals.synthetic import cells, film_of, frame_numbers
from vtp_plugin.signals.views import RowsView
from vtp_plugin.stages import Stage


def without_videos(family: Family, strategy: Asking) -> str:
    """Why no token has a frame."""
    return "" if family.videos else f"it compares the frames of a video, {family.models} is shown pictures only"


@signal(
    "film",
    Stage.PROJECTOR,
    "[] three whole numbers: frames, rows and columns of the tokens of each, before pruning; a picture is one frame",
    refuse=without_videos,
    sample=film_of,
)
def film(at: RowsView) -> tuple[int, int, int]:
    return at.film


@signal(
    "frame",
    Stage.PROJECTOR,
    "[B, N] long: the frame that the token is of, 0 in a picture",
    refuse=without_videos,
    sample=frame_numbers,
)
def frame(at: RowsView) -> Tensor:
    return at.frame


@signal(
    "cell",
    Stage.PROJECTOR,
    "[B, N, 2] long: row and column of the token in its frame",
    refuse=without_videos,
    sample=cells,
)
def cell(at: RowsView) -> Tensor:
    return at.cell
