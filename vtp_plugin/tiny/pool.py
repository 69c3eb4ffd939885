"""Scenes drawn once, kept as arrays: what training reads instead of drawing again."""

from __future__ import annotations

import io
import os
import pickle
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


def draw_chunk(split: Split, seeds: range) -> tuple[list[Scene], np.ndarray, np.ndarray]:
    """Scenes; images, uint8 [B, H, W, 3]; and patch labels, uint8 [B, 4, N]."""
    scenes = [sample_scene(split, seed) for seed in seeds]
    labels = [[getattr(scene.patch_labels(), name) for name in LABELS] for scene in scenes]
    return scenes, np.stack([draw(scene) for scene in scenes]), np.array(labels, np.uint8)


def usable_cores() -> int:
    """As many as this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def draw_pool(path: Path, split: Split, size: int, advance: Callable[[int], object] = lambda n: None) -> None:
    """Write `{split}-scenes.pkl`, `-images.npy` and `-labels.npy` for the seeds 0 .. size - 1, with all cores."""
    images = np.lib.format.open_memmap(path / f"{split}-images.tmp", "w+", np.uint8, (size, SIZE, SIZE, 3))
    labels = np.zeros((size, len(LABELS), GRID * GRID), np.uint8)
    scenes: list[Scene] = []
    chunks = [range(start, min(start + 100, size)) for start in range(0, size, 100)]
    with ProcessPoolExecutor(usable_cores()) as workers:
        for seeds, drawn in zip(chunks, workers.map(draw_chunk, [split] * len(chunks), chunks), strict=True):
            scenes += drawn[0]
            images[seeds.start : seeds.stop], labels[seeds.start : seeds.stop] = drawn[1:]
            advance(len(seeds))
    images.flush()
    (path / f"{split}-scenes.pkl").write_bytes(pickle.dumps(scenes))
    np.save(path / f"{split}-labels.npy", labels)
    (path / f"{split}-images.tmp").rename(path / f"{split}-images.npy")


def open_scenes(path: Path, split: Split) -> list[Scene]:
    """The scenes themselves; to place the things of one anew takes longer than to learn from it."""
    return pickle.loads((path / f"{split}-scenes.pkl").read_bytes())


def open_pool(path: Path, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images, mapped from disk, and labels."""
    return np.load(path / f"{split}-images.npy", mmap_mode="r"), np.load(path / f"{split}-labels.npy")


def write_features(
    path: Path,
    images: np.ndarray,
    glimpse: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    advance: Callable[[int], object] = lambda n: None,
    chunk: int = 50,
) -> None:
    """Write `train-features.npy` [P, N, D] and `train-attention.npy` [P, N] in half precision."""
    attention, features = [], None
    for start in range(0, len(images), chunk):
        seen, attended = glimpse(np.array(images[start : start + chunk]))
        if features is None:
            shape = (len(images), *seen.shape[1:])
            features = np.lib.format.open_memmap(path / "train-features.tmp", "w+", np.float16, shape)
        features[start : start + chunk] = seen
        attention.append(attended)
        advance(len(seen))
    features.flush()
    np.save(path / "train-attention.npy", np.concatenate(attention))
    (path / "train-features.tmp").rename(path / "train-features.npy")


def open_features(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Features, mapped from disk, and attention, if they are written down."""
    if not (path / "train-features.npy").exists():
        return None
    return np.load(path / "train-features.npy", mmap_mode="r"), np.load(path / "train-attention.npy")
