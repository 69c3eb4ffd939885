"""Prompts of the authors' `llava` package: one placeholder id stands for all rows of an image. No family itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
