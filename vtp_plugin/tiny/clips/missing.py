"""Clips with fewer visual tokens than they have: missing.py's patterns where they fit, and those of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..missing import FEWEST, MERGED, MOST, NOISY, ORIGINAL, Sight, absorb, noise, renumber, similarity_to_mean
from ..missing import PATTERNS as OF_PICTURES
from .clip import FRAMES

WHOLE = 0.5  # share of the steps in which nothing is missing
LEFT = np.geomspace(FEWEST, MOST, 10)  # shares that are left; few, because a CPU makes kernels for every length


@dataclass(frozen=True)
class Shown:
    """A batch of clips as the language model is shown them, [B, T n, ...], frame after frame."""

    tokens: Tensor  # [B, N, D]
    attention: Tensor  # [B, N] of CLS
    things: Tensor  # [B, N] 1 where something is

    def by_frame(self) -> Tensor:  # [B, T, n, D]
        return self.tokens.unflatten(1, (FRAMES, -1))


def some_missing(shown: Shown, rng: np.random.Generator) -> tuple[Sight, Tensor]:
    """All tokens, or what is left; and which [B, K]."""
    count = shown.tokens.shape[1]
    everything = torch.arange(count, device=shown.tokens.device).expand(len(shown.tokens), -1)
    if rng.random() < WHOLE:
        return Sight(shown.tokens, everything, count), everything
    k = max(1, round(count * float(LEFT[rng.integers(len(LEFT))])))
    index = draw(shown, k, rng)
    left = shown.tokens.gather(1, index[..., None].expand(-1, -1, shown.tokens.shape[-1]))
    if rng.random() < MERGED / 2:
        left = absorb(shown.tokens, index)
    return renumber(left, index, count, original=bool(rng.random() < ORIGINAL)), index


Pattern = Callable[[Shown, np.random.Generator], Tensor]  # -> [B, N], high stays


def draw(shown: Shown, k: int, rng: np.random.Generator) -> Tensor:  # [B, k]
    """Raster positions of what is left, ascending, by a pattern that is drawn; half of the time blurred with noise."""
    pattern = list(PATTERNS.values())[rng.integers(len(PATTERNS))]
    score = pattern(shown, rng).float()
    if rng.random() < NOISY:
        score = score.argsort(1).argsort(1) / score.shape[1] + float(rng.uniform(0, 1.5)) * noise(score, rng)
    return score.topk(k, 1).indices.sort(1).values


def frames(shown: Shown, rng: np.random.Generator) -> Tensor:
    """Whole frames."""
    of_frame = noise(shown.tokens, rng)[:, :FRAMES, None].expand(shown.by_frame().shape[:3])
    return of_frame.flatten(1) + 1e-5 * noise(shown.tokens, rng)


def places(shown: Shown, rng: np.random.Generator) -> Tensor:
    """The same places of all frames."""
    n = shown.tokens.shape[1] // FRAMES
    return noise(shown.tokens, rng)[:, :n].repeat(1, FRAMES) + 1e-5 * noise(shown.tokens, rng)


def stride(shown: Shown, rng: np.random.Generator) -> Tensor:
    """Evenly spread over places and time: a low-discrepancy order."""
    position, phase = torch.arange(shown.tokens.shape[1], device=shown.tokens.device), noise(shown.tokens, rng)[:, :1]
    return (position * 0.6180339887 + phase) % 1


def change(shown: Shown, rng: np.random.Generator) -> Tensor:
    """1 - cosine with the same place one frame earlier; the first frame's are as drawn: all of it, none, or some."""
    normed = F.normalize(shown.by_frame(), dim=-1)
    changed = 1 - (normed[:, 1:] * normed[:, :-1]).sum(-1)  # [B, T - 1, n]
    first = float(rng.choice([-1, 0, 3])) + noise(shown.tokens, rng)[:, : normed.shape[2]]
    return torch.cat([first[:, None], changed], 1).flatten(1)


PATTERNS: dict[str, Pattern] = {
    "random": lambda shown, rng: noise(shown.tokens, rng),
    "random again": lambda shown, rng: noise(shown.tokens, rng),
    "frames": frames,
    "places": places,
    "stride": stride,
    "most changed": change,
    "least changed": lambda shown, rng: -change(shown, rng),
    "most attended": lambda shown, rng: shown.attention,
    "least attended": lambda shown, rng: -shown.attention,
    "most similar": lambda shown, rng: similarity_to_mean(shown.tokens),
    "least similar": lambda shown, rng: -similarity_to_mean(shown.tokens),
    "largest": lambda shown, rng: shown.tokens.norm(dim=-1),
    "smallest": lambda shown, rng: -shown.tokens.norm(dim=-1),
    "diverse": lambda shown, rng: OF_PICTURES["diverse"](shown.tokens, shown.attention, shown.things, rng),
    "things": lambda shown, rng: shown.things + noise(shown.tokens, rng),
    "background": lambda shown, rng: noise(shown.tokens, rng) - 2.0 * shown.things,
}
