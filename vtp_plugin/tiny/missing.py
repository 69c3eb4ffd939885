"""Prompts with fewer visual tokens than the picture has: patterns of every kind, so that none is favoured.

A language model that saw only whole pictures takes a pruned prompt for something else than a picture. Here tokens are
missing in some of its training steps: which ones is drawn from scores that rise and fall with everything that pruning
methods go by, and with nothing; sometimes what is left is merged. What is asked stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST, MOST = 0.06, 0.9  # share of the tokens that is left, uniform on a logarithmic scale
WHOLE, ORIGINAL, MERGED, NOISY = 0.6, 0.5, 0.25, 0.5  # share of steps: nothing missing; of the others


@dataclass(frozen=True)
class Sight:
    """The visual tokens of a batch that are left."""

    tokens: Tensor  # [B, K, D]
    place: Tensor  # [B, K], or [axes, B, K], their positions behind what stands before, as the language model counts
    length: int  # how far it counts them


def whole(tokens: Tensor) -> Sight:
    """Everything is there."""
    count = tokens.shape[1]
    return Sight(tokens, torch.arange(count, device=tokens.device).expand(len(tokens), -1), count)


def some_missing(tokens: Tensor, attention: Tensor, things: Tensor, rng: np.random.Generator) -> Sight:
    """All tokens [B, N, D], or what is left; by what CLS attends to [B, N], by where things are [B, N], by neither."""
    if rng.random() < WHOLE:
        return whole(tokens)
    count = tokens.shape[1]
    k = max(1, round(count * float(np.exp(rng.uniform(np.log(FEWEST), np.log(MOST))))))
    if rng.random() < MERGED / 2:
        left, index = pool(tokens, k)
    else:
        index = draw(tokens, attention, things, k, rng)
        left = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
        if rng.random() < MERGED / 2:
            left = absorb(tokens, index)
    return renumber(left, index, count, original=bool(rng.random() < ORIGINAL))


def renumber(left: Tensor, index: Tensor, count: int, original: bool) -> Sight:
    """Positions of the whole prompt, with the question behind it, or those of a shorter prompt."""
    return Sight(left, index, count) if original else whole(left)


# -- which are left ----------------------------------------------------------------------------------------------------

Pattern = Callable[
    [Tensor, Tensor, Tensor, np.random.Generator], Tensor
]  # tokens, attention, things -> [B, N], high stays


def draw(tokens: Tensor, attention: Tensor, things: Tensor, k: int, rng: np.random.Generator) -> Tensor:  # [B, k]
    """Raster positions of what is left, ascending, by a pattern that is drawn; half of the time blurred with noise."""
    names = list(PATTERNS)
    pattern = PATTERNS[names[rng.integers(len(names))]]
    score = pattern(tokens, attention, things, rng).float()
    if rng.random() < NOISY:
        score = score.argsort(1).argsort(1) / score.shape[1] + float(rng.uniform(0, 1.5)) * noise(score, rng)
    return score.topk(k, 1).indices.sort(1).values


def side_of(tokens: Tensor) -> int:
    """Of the square picture that all tokens [B, N, ...] are."""
    return math.isqrt(tokens.shape[1])


def noise(like: Tensor, rng: np.random.Generator) -> Tensor:  # [B, N]
    return torch.from_numpy(rng.random(tuple(like.shape[:2]), np.float32)).to(like.device)


def block(tokens: Tensor, attention: Tensor, things: Tensor, rng: np.random.Generator) -> Tensor:
    """The neighbourhood of a point, or all but that, wider than high or higher than wide."""
    side, raster = side_of(tokens), torch.arange(tokens.shape[1], device=tokens.device)
    rows, columns = raster // side, raster % side
    row, column = torch.from_numpy(rng.uniform(0, side - 1, (2, len(tokens), 1))).to(tokens.device)
    far = torch.maximum((rows - row).abs() * float(rng.uniform(0.5, 2)), (columns - column).abs())
    return far * float(rng.choice([-1, 1])) + 0.01 * noise(tokens, rng)


def blocks(tokens: Tensor, attention: Tensor, things: Tensor, rng: np.random.Generator) -> Tensor:
    """Whole squares of the picture."""
    side, grid = int(rng.choice([2, 3, 4, 6])), side_of(tokens)
    parts = -(-grid // side)
    coarse = noise(tokens, rng)[:, : parts**2].view(-1, parts, parts)
    fine = coarse.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :grid, :grid]
    return fine.flatten(1) + 1e-4 * noise(tokens, rng)


def stride(tokens: Tensor, attention: Tensor, things: Tensor, rng: np.random.Generator) -> Tensor:
    """Evenly spread: a low-discrepancy order of the raster, or of rows and columns."""
    side, position = side_of(tokens), torch.arange(tokens.shape[1], device=tokens.device)
    phase = noise(tokens, rng)[:, :1]
    if rng.random() < 0.5:
        return (position * 0.6180339887 + phase) % 1
    return (position // side * 0.7548776662 + position % side * 0.5698402910 + phase) % 1


def similarity_to_mean(tokens: Tensor) -> Tensor:
    return F.cosine_similarity(tokens, tokens.mean(1, keepdim=True), dim=-1)


def similarity_to_neighbours(tokens: Tensor) -> Tensor:
    """Mean cosine with what is above, below, left and right, the border's own beyond it."""
    grid = F.normalize(tokens, dim=-1).unflatten(1, (side_of(tokens), -1))
    padded = F.pad(grid.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="replicate").permute(0, 2, 3, 1)
    around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    return (grid * around).sum(-1).flatten(1)


def diverse(tokens: Tensor, attention: Tensor, things: Tensor, rng: np.random.Generator) -> Tensor:
    """Farthest points first."""
    normed = F.normalize(tokens, dim=-1)
    order = torch.zeros(tokens.shape[:2], device=tokens.device)
    at = noise(tokens, rng).argmax(1)
    nearest = tokens.new_full(tokens.shape[:2], -2.0)
    rows = torch.arange(len(tokens), device=tokens.device)
    for step in range(tokens.shape[1]):
        order[rows, at] = -step
        nearest = torch.maximum(nearest, (normed @ normed[rows, at, :, None])[..., 0])
        nearest[rows, at] = 3.0  # taken
        at = nearest.argmin(1)
    return order


PATTERNS: dict[str, Pattern] = {
    "random": lambda tokens, attention, things, rng: noise(tokens, rng),
    "random again": lambda tokens, attention, things, rng: noise(tokens, rng),
    "block": block,
    "blocks": blocks,
    "stride": stride,
    "most attended": lambda tokens, attention, things, rng: attention,
    "least attended": lambda tokens, attention, things, rng: -attention,
    "most similar": lambda tokens, attention, things, rng: similarity_to_mean(tokens),
    "least similar": lambda tokens, attention, things, rng: -similarity_to_mean(tokens),
    "like neighbours": lambda tokens, attention, things, rng: similarity_to_neighbours(tokens),
    "unlike neighbours": lambda tokens, attention, things, rng: -similarity_to_neighbours(tokens),
    "largest": lambda tokens, attention, things, rng: tokens.norm(dim=-1),
    "smallest": lambda tokens, attention, things, rng: -tokens.norm(dim=-1),
    "diverse": diverse,
    "things": lambda tokens, attention, things, rng: things + noise(tokens, rng),
    "background": lambda tokens, attention, things, rng: noise(tokens, rng) - 2.0 * things,
}

# -- what they become --------------------------------------------------------------------------------------------------


def absorb(tokens: Tensor, index: Tensor) -> Tensor:  # [B, N, D], [B, K] -> [B, K, D]
    """Every token that is gone is averaged into the most similar one that is left."""
    normed = F.normalize(tokens, dim=-1)
    kept = normed.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
    similar = normed @ kept.transpose(1, 2)  # [B, N, K]
    owner = F.one_hot(similar.argmax(2), index.shape[1])
    own = F.one_hot(index, tokens.shape[1]).transpose(1, 2)  # a token that is left stays its own
    owner = torch.where(own.sum(2, keepdim=True) > 0, own, owner).to(tokens.dtype)
    return owner.transpose(1, 2) @ tokens / owner.sum(1)[..., None]


def pool(tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Averages over about k rectangles of the grid, and the positions of their middles."""
    side = side_of(tokens)
    rows = max(1, min(side, round(k**0.5)))
    columns = max(1, min(side, round(k / rows)))
    by_row, by_column = (torch.arange(side, device=tokens.device) * parts // side for parts in (rows, columns))
    owner = F.one_hot((by_row[:, None] * columns + by_column).flatten(), rows * columns).to(tokens.dtype)  # [N, K]
    middle_row, middle_column = (
        ((torch.arange(parts, device=tokens.device) * 2 + 1) * side // (2 * parts)) for parts in (rows, columns)
    )
    middles = (middle_row[:, None] * side + middle_column).flatten().expand(len(tokens), -1)
    return owner.T @ tokens / owner.sum(0)[:, None], middles
