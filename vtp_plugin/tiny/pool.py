"""Scenes drawn once, kept as arrays: what training reads instead of drawing again."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from .scenes import GRID, SIZE, Scene, Split, sample_scene

LABELS = ("shape", "color", "digit", "center")


def encode_jpeg(image: Image.Image) -> bytes:
    """How a scene is stored; training sees the same artefacts as the test."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def draw(scene: Scene) -> np.ndarray:  # uint8 [H, W, 3]
    return np.asarray(Image.open(io.BytesIO(encode_jpeg(scene.render()))))


def draw_chunk(split: Split, seeds: range) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [B, H, W, 3], and patch labels, uint8 [B, 4, N]."""
    scenes = [sample_scene(split, seed) for seed in seeds]
    labels = [[getattr(scene.patch_labels(), name) for name in LABELS] for scene in scenes]
    return np.stack([draw(scene) for scene in scenes]), np.array(labels, np.uint8)


def draw_pool(path: Path, split: Split, size: int, advance: Callable[[int], object] = lambda n: None) -> None:
    """Write `{split}-images.npy` and `{split}-labels.npy` for the seeds 0 .. size - 1, with all cores."""
    images = np.lib.format.open_memmap(path / f"{split}-images.tmp", "w+", np.uint8, (size, SIZE, SIZE, 3))
    labels = np.zeros((size, len(LABELS), GRID * GRID), np.uint8)
    chunks = [range(start, min(start + 100, size)) for start in range(0, size, 100)]
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for seeds, drawn in zip(chunks, workers.map(draw_chunk, [split] * len(chunks), chunks), strict=True):
            images[seeds.start : seeds.stop], labels[seeds.start : seeds.stop] = drawn
            advance(len(seeds))
    images.flush()
    np.save(path / f"{split}-labels.npy", labels)
    (path / f"{split}-images.tmp").rename(path / f"{split}-images.npy")


def open_pool(path: Path, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images, mapped from disk, and labels."""
    return np.load(path / f"{split}-images.npy", mmap_mode="r"), np.load(path / f"{split}-labels.npy")
