"""Pictures, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np

from vtp_plugin.reporting.views import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL = 44  # characters under a panel
FADED = 0.18  # how much of a dropped patch is still visible


def kept_figure(rows: Sequence[Sequence[View]]) -> Figure:
    """One row per picture, one panel per strategy; dropped patches are faded out."""
    from matplotlib.figure import Figure

    width = max(len(row) for row in rows)
    figure = Figure(figsize=(2.0 * width, 2.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), width, squeeze=False)
    for panels, row in zip(axes, rows, strict=True):
        for axis, seen in zip(panels, row, strict=False):
            _draw(axis, seen)
    return figure


def _draw(axis: Axes, seen: View) -> None:
    pixels = np.asarray(seen.picture, dtype=np.float32) / 255
    axis.imshow(pixels * _mask(seen, pixels.shape[:2]))
    axis.set_title(f"{seen.label}: {seen.after}/{seen.before}", fontsize=8)
    axis.set_xlabel(shorten(f"{seen.question}: {seen.answer}", LABEL, placeholder=" ..."), fontsize=7)
    axis.set_xticks([])
    axis.set_yticks([])


def _mask(seen: View, shape: tuple[int, int]) -> np.ndarray:
    """1 over kept patches, FADED over the others, [H, W, 1]."""
    flat = np.full(seen.grid[0] * seen.grid[1], FADED, dtype=np.float32)
    flat[seen.kept] = 1
    rows = np.arange(shape[0]) * seen.grid[0] // shape[0]
    columns = np.arange(shape[1]) * seen.grid[1] // shape[1]
    return flat.reshape(seen.grid)[rows][:, columns, None]
