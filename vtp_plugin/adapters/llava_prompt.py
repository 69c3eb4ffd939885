"""Prompts of the authors' `llava` package: one placeholder id stands for all rows of an image. No family itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.errors import PruningError
from vtp_plugin.facts.image import Image
from vtp_plugin.surgery.columns import Rows
from vtp_plugin.surgery.placeholders import spare

PLACEHOLDER = -200  # llava.constants.IMAGE_TOKEN_INDEX


def spread(ids: Tensor, images: Sequence[tuple[int, int]]) -> tuple[Tensor, list[tuple[int, int]], int]:
    """A merged prompt of ids [L]: every column's position in the whole one [columns], its images, the whole length.

    `images`: rows in the whole prompt, and how many are left. The columns of an image have the position of its first.
    """
    images, positions, spans, whole = iter(images), [], [], 0
    for token in ids.tolist():
        total, left = next(images) if token == PLACEHOLDER else (1, 1)
        if token == PLACEHOLDER:
            spans.append((len(positions), len(positions) + left))
        positions += [whole] * left
        whole += total
    return torch.tensor(positions, dtype=torch.long), spans, whole


def placeholders(ids: Tensor) -> int:
    """How many images a prompt [L] shows."""
    return int((ids == PLACEHOLDER).sum())


def show(image: Image, left: int, *, speaks: bool) -> None:
    """Leave an image the columns, of those of the `left` rows of it, that strategies may drop.

    There are fewer where the host truncates its prompt, or shows none. `speaks`: its prompt ends with them, and decoder
    layers judge them.
    """
    columns, judged, shown = image.columns, image.judged, len(image.columns)
    if shown == left:
        image.columns = Rows(columns, judged, image.fixed).only_judged(columns)
    else:
        image.columns = columns if judged is None else columns[judged[:shown]]
        image.index, image.entered = image.index[: len(image.columns)], shown
        image.fixed = shown - len(image.columns)
    if speaks and shown and (judged is None or judged[shown - 1]):
        spare(image)


def plain(images: Any) -> Tensor:
    """Images [B, 3, H, W] from what the package accepts; crops (LLaVA-1.6) are refused."""
    if isinstance(images, Tensor) and images.ndim == 4:
        return images
    crops = [image if image.ndim == 3 else image[0] for image in images]
    if any(image.ndim == 4 and len(image) > 1 for image in images):
        raise PruningError("llava: images cut into several crops (image_aspect_ratio=anyres) cannot be pruned yet")
    return torch.stack(crops)
