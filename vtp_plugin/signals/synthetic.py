"""Values of signals without a model: for `vtp check`, and for whoever must know how many tokens a method keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

WORDS, HEADS = 5, 20  # text tokens behind an image, and heads


@dataclass(frozen=True)
class Widths:
    """How wide synthetic tokens and signals are."""

    tower: int = 16  # features of the vision tower, keys of all heads together
    llm: int = 16  # hidden states and projected tokens
    shared: int = 16  # CLIP's joint space
    head: int = 16
    patch: int = 4  # pixels per side


@dataclass(frozen=True)
class Draw:
    """B images of N tokens each, of one kind, from one seed."""

    b: int
    n: int
    kind: str = "random"  # or equal, zero, repeated, large; of pixels: framed, black above and blurred into the rest
    widths: Widths = Widths()
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))

    def shape(self, axes: tuple[str, ...], model: int) -> tuple[int, ...]:
        """The sizes of a signal's axes; `model` is the width of the tokens."""
        w = self.widths
        known = {"B": self.b, "N": self.n, "M": self.n, "T": WORDS, "H": HEADS, "D": model, "E": w.shared, "L": w.llm}
        known |= {"d": w.head, "d'": w.tower, "p": w.patch}
        return tuple(int(axis) if axis.isdigit() else known.get(axis, w.tower) for axis in axes)

    def normal(self, *shape: int) -> Tensor:
        """Normal values; those of a token, the last axis but one, are of the kind."""
        x = torch.randn(shape, generator=self.generator)
        if self.kind == "equal":
            return x[..., :1, :].expand_as(x).clone()
        if self.kind == "zero":
            return torch.zeros_like(x)
        if self.kind == "repeated":
            return x[..., torch.arange(x.shape[-2]) % min(4, x.shape[-2]), :]
        return x * 1000 if self.kind == "large" else x

    def plain(self, *shape: int) -> Tensor:
        """Normal values, whatever the kind."""
        return torch.randn(shape, generator=self.generator)

    def value(self, signal: Any, model: int) -> Any:
        """A sample of a declared signal."""
        shape = self.shape(signal.axes, model)
        if signal.sample is not None:
            return signal.sample(self, shape)
        of_tokens = len(shape) == 3 and signal.axes[1] in "NM"
        return self.normal(*shape) if of_tokens else self.plain(*shape)


# -- for the `sample` of a declaration: functions of a Draw and a shape -----------------------------------------------


def attention_rows(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    """Positive rows that add up to less than one: the rest goes to other tokens."""
    return torch.softmax(draw.normal(*shape, 1)[..., 0] * 2, -1) * 0.9


def absolute_sums(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    """L1 norms of normal vectors."""
    return draw.normal(*shape, draw.widths.tower).abs().sum(-1)


def peaked(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    """Normal values with twice the spread."""
    return draw.plain(*shape) * 2


def whole_numbers(low: int, high: int) -> Callable[[Draw, tuple[int, ...]], Tensor]:
    """Whole numbers in [low, high)."""
    return lambda draw, shape: torch.randint(low, high, shape, generator=draw.generator).float()


def places(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    """Uniform in (0, 1)."""
    return torch.rand(shape, generator=draw.generator)


def view_numbers(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    """A picture of the whole and four sub-images, one after the other."""
    return (torch.arange(shape[1]) * 5 // shape[1]).expand(shape)


def film_of(draw: Draw, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Up to eight frames of one row each."""
    frames = next(f for f in (8, 7, 6, 5, 4, 3, 2, 1) if draw.n % f == 0)
    return frames, 1, draw.n // frames


def frame_numbers(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    """One frame after the other."""
    return (torch.arange(shape[1]) // film_of(draw, shape)[2]).expand(shape)


def cells(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    """In each of them, from left to right."""
    across = torch.arange(shape[1]) % film_of(draw, shape)[2]
    return torch.stack([torch.zeros_like(across), across], dim=-1).expand(shape)


def head_count(draw: Draw, shape: tuple[int, ...]) -> int:
    """Heads of a tower."""
    return HEADS


def fingerprints(draw: Draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One number per image."""
    return tuple(range(7, 7 + draw.b))


def raw_patches(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    """Patches [B, N, 3, p, p] uint8 with flat, close and noisy neighbours."""
    b, n, one = *shape[:2], (*shape[:2], 1, 1, 1)
    levels = torch.randint(0, 2, one, generator=draw.generator) * 96 + 30  # just below the edge of a bin
    spread = torch.tensor([0, 1, 3, 12, 60])[torch.randint(0, 5, one, generator=draw.generator)]
    noise = (torch.rand(b, n, *shape[2:], generator=draw.generator) * spread).long()
    pixels = (levels + noise).clamp(0, 255).to(torch.uint8)
    if draw.kind == "framed":
        above = pixels[:, : math.isqrt(pixels.shape[1])].zero_()
        above[..., -2:, :] = 10
    return pixels[:, :1].expand_as(pixels).clone() if draw.kind == "equal" else pixels * (draw.kind != "zero")
