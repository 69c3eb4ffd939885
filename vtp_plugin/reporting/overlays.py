"""What lies over a picture: dropped patches, scores, clusters of merged tokens; one pixel per patch.

A browser or matplotlib enlarges the pixels to patches, so an overlay is a few hundred bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

VEIL = (62, 66, 104, 225)  # over a dropped patch, RGBA
NOTHING = (0, 0, 0, 0)
LEVELS = 15  # of a score map; one more colour is transparent
HEAT, HEAT_ALPHA = "inferno", 215
CLUSTERS, CLUSTER_ALPHA = "tab20", 225


def veil(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kept patches [rows, columns] bool: colour numbers [rows, columns] uint8 and colours [n, 4] uint8."""
    return (~kept).astype(np.uint8), np.array([NOTHING, VEIL], dtype=np.uint8)


def heat(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores [rows, columns], nan where there is none; the lowest is dark, the highest bright."""
    from matplotlib import colormaps

    there = ~np.isnan(scores)
    low, high = (scores[there].min(), scores[there].max()) if there.any() else (0.0, 1.0)
    levels = np.zeros(scores.shape, dtype=np.uint8)
    share = (scores[there] - low) / max(high - low, np.finfo(np.float32).tiny)
    levels[there] = 1 + np.round(share * (LEVELS - 1)).astype(np.uint8)
    colours = np.round(colormaps[HEAT](np.linspace(0, 1, LEVELS)) * 255)
    colours[:, 3] = HEAT_ALPHA
    return levels, np.vstack([NOTHING, colours]).astype(np.uint8)


def css(colour: Sequence[int]) -> str:
    """RGBA in 0 ... 255 as a page writes it."""
    return f"rgb({colour[0]} {colour[1]} {colour[2]} / {colour[3] / 255:.2f})"


def scale() -> str:
    """The colours of `heat` from the lowest to the highest score, as a page's gradient."""
    _, colours = heat(np.linspace(0, 1, LEVELS)[None])
    return f"linear-gradient(to right, {', '.join(css(colour) for colour in colours[1:].tolist())})"


def clusters(into: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where tokens were merged into [rows, columns], -1 for none: one colour per cluster, its target included."""
    from matplotlib import colormaps

    flat = into.flatten()
    targets = np.unique(flat[flat >= 0])
    palette = np.round(colormaps[CLUSTERS](np.arange(20)) * 255)
    palette[:, 3] = CLUSTER_ALPHA
    numbers = np.zeros(len(flat), dtype=np.uint8)
    for number, target in enumerate(targets):
        numbers[(flat == target) | (np.arange(len(flat)) == target)] = 1 + number % 20
    return numbers.reshape(into.shape), np.vstack([NOTHING, palette]).astype(np.uint8)


def rgba(overlay: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """[rows, columns, 4] uint8."""
    numbers, colours = overlay
    return colours[numbers]


def png(overlay: tuple[np.ndarray, np.ndarray]) -> bytes:
    """One pixel per patch, with a palette."""
    from PIL import Image

    numbers, colours = overlay
    picture = Image.frombytes("P", numbers.shape[::-1], numbers.tobytes())
    picture.putpalette(colours[:, :3].tobytes())
    bits = next(bits for bits in (1, 2, 4, 8) if len(colours) <= 2**bits)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True, bits=bits, transparency=bytes(colours[:, 3].tolist()))
    return buffer.getvalue()
