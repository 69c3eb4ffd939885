"""Pictures, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np

from vtp_plugin.reporting import overlays
from vtp_plugin.reporting.views import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL = 40  # characters of a line under a panel
MARKS = {True: ("\u2713", "#1a7f43"), False: ("\u2717", "#b3261e"), None: ("", "black")}  # right, wrong, not known


def kept_figure(rows: Sequence[Sequence[View]], *, scores: bool = False) -> Figure:
    """One row per picture, one panel per strategy. Dropped patches are veiled, lines lead to where tokens merged.

    `scores`: below every row, what the strategies ranked by; bright is high.
    """
    from matplotlib.figure import Figure

    width, bands = max(len(row) for row in rows), 1 + scores
    figure = Figure(figsize=(2.0 * width, 2.5 * bands * len(rows)), layout="constrained")
    axes = figure.subplots(bands * len(rows), width, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, row in enumerate(rows):
        for column, seen in enumerate(row):
            _draw_kept(axes[bands * number, column], seen)
            if scores:
                _draw_scores(axes[bands * number + 1, column], seen)
    return figure


def drawn(figure: Figure, suffix: str, dpi: int = 150) -> bytes:
    """The figure as a file of that ending (.png, .pdf, ...)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix.lower().lstrip("."), dpi=dpi)
    return buffer.getvalue()


def _draw_kept(axis: Axes, seen: View) -> None:
    pixels = _pixels(seen)
    axis.imshow(pixels)
    _overlay(axis, overlays.veil(_kept(seen)))
    _frame(axis, f"{seen.label}: {seen.look.left}/{seen.look.total}")
    mark, colour = MARKS[seen.right]
    said = filter(None, [seen.question, " ".join(filter(None, [mark, seen.answer]))])
    label = "\n".join(shorten(line, LABEL, placeholder=" ...") for line in said)
    axis.set_xlabel(label, fontsize=7, color=colour, parse_math=False)
    if seen.look.into:
        _draw_merged(axis, seen, pixels.shape[:2])


def _draw_scores(axis: Axes, seen: View) -> None:
    pixels = _pixels(seen)
    _frame(axis, f"scores of {seen.look.scored_by}" if seen.look.scored_by else "not ranked by one score")
    axis.imshow(pixels)
    if seen.look.scores is not None:
        _overlay(axis, overlays.heat(seen.look.scores.numpy().reshape(seen.look.grid)))


def _draw_merged(axis: Axes, seen: View, shape: tuple[int, int]) -> None:
    """A line from every merged token to the one that took it up, and a dot there; one colour per target."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    into = np.array(seen.look.into)
    sources = (into >= 0).nonzero()[0]
    _, number = np.unique(into[sources], return_inverse=True)
    colours = colormaps[overlays.CLUSTERS](number % 20)
    first, last = (_centres(positions, seen.look.grid, shape) for positions in (sources, into[sources]))
    axis.add_collection(LineCollection(np.stack([first, last], axis=1), colors=colours, linewidths=0.8))
    axis.scatter(last[:, 0], last[:, 1], s=9, c=colours)


def _centres(positions: np.ndarray, grid: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Middle of the patches at raster positions [N], in pixels, [N, 2] as x and y."""
    rows, columns = positions // grid[1], positions % grid[1]
    return np.stack([(columns + 0.5) * shape[1] / grid[1], (rows + 0.5) * shape[0] / grid[0]], axis=1) - 0.5


def _frame(axis: Axes, title: str) -> None:
    axis.set_axis_on()
    axis.set_title(title, fontsize=8, parse_math=False)
    axis.set_xticks([])
    axis.set_yticks([])


def _pixels(seen: View) -> np.ndarray:
    """The picture as the model saw it, [H, W, 3] in 0 ... 1."""
    return seen.look.pixels.permute(1, 2, 0).numpy().astype(np.float32) / 255


def _kept(seen: View) -> np.ndarray:
    """Which patches are left, [rows, columns] bool."""
    kept = np.zeros(seen.look.grid[0] * seen.look.grid[1], dtype=bool)
    kept[seen.look.kept] = True
    return kept.reshape(seen.look.grid)


def _overlay(axis: Axes, overlay: tuple[np.ndarray, np.ndarray]) -> None:
    """One pixel per patch over the picture that the axis shows, as on the report's page."""
    axis.imshow(overlays.rgba(overlay), extent=axis.images[0].get_extent(), interpolation="nearest")
