"""VidCom2 against its restatement with lists."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import slow
import torch

from vtp_plugin import VisualTokens, get_strategy

FILMS = [(1, 2, 3), (2, 1, 5), (4, 3, 4), (9, 2, 2)]
Rows = list[list[float]]


def mean(rows: Rows) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def calm(rows: Rows, share: float) -> Rows:
    """The channels with the lowest variance, rows of length one."""
    middle = mean(rows)
    variance = [sum((row[c] - middle[c]) ** 2 for row in rows) for c in range(len(middle))]
    chosen = sorted(range(len(middle)), key=lambda c: (variance[c], c))[: max(1, int(share * len(middle)))]
    made = []
    for row in rows:
        size = math.sqrt(sum(row[c] ** 2 for c in chosen))
        made.append([row[c] / size if size else 0.0 for c in chosen])
    return made


def alike(row: list[float], centre: list[float]) -> float:
    squared = sum((a - b) ** 2 for a, b in zip(row, centre, strict=True))
    return sum(math.exp(-squared / (2 * 2.0**power)) for power in range(-3, 2))


def restated(seen: VisualTokens, b: int, k: int, share: float = 0.5, temperature: float = 0.01) -> list[int]:
    rows, frames = calm(seen.tokens[b].double().tolist(), share), defaultdict(list)
    for column, frame in enumerate(seen.frame[b].tolist()):
        frames[frame].append(column)
    centre, of_frame = mean(rows), {f: mean([rows[c] for c in own]) for f, own in frames.items()}
    to_video = [alike(row, centre) for row in rows]
    distinct = {f: -sum(to_video[c] for c in own) / len(own) for f, own in frames.items()}
    top = max(distinct.values())
    weight = {f: math.exp((value - top) / temperature) for f, value in distinct.items()}
    p = {f: w / sum(weight.values()) for f, w in weight.items()}
    exact = {f: (1 + p[f] - sum(p.values()) / len(p)) * len(own) for f, own in frames.items()}
    exact = {f: k * value / sum(exact.values()) for f, value in exact.items()}
    quota = {f: min(int(value + 1e-9), len(frames[f])) for f, value in exact.items()}
    order = sorted(frames, key=lambda f: (-round(exact[f] - quota[f], 6), f))
    turn = 0
    while sum(quota.values()) < k:
        frame = order[turn % len(order)]
        quota[frame] += quota[frame] < len(frames[frame])
        turn += 1
    kept = []
    for frame, own in frames.items():
        score = {c: to_video[c] + alike(rows[c], of_frame[frame]) for c in own}
        kept += sorted(own, key=lambda c: (score[c], c))[: quota[frame]]
    return sorted(kept)


def scenes(film: tuple[int, int, int], dtype: torch.dtype = torch.float32, d: int = 20) -> torch.Tensor:
    """Frames that are more or less alike."""
    frames, rows, columns = film
    x = torch.randn(2, 1, 1, d) + torch.linspace(0.1, 1, frames)[:, None, None] * torch.randn(
        2, frames, rows * columns, d
    )
    return x.flatten(1, 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("keep", [0.05, 0.25, 0.6, 0.97])
@pytest.mark.parametrize("film", FILMS)
def test_as_described(film: tuple[int, int, int], keep: float, share: float, dtype: torch.dtype):
    seen = slow.video(scenes(film, dtype), film)
    strategy = get_strategy("vidcom2")(keep_ratio=keep, channels=share)
    kept, k = strategy.decide(seen), strategy.count(seen.tokens.shape[1])
    assert slow.columns(kept) == [restated(seen, b, k, share) for b in range(2)]


@pytest.mark.parametrize("temperature", [0.01, 0.3, 10.0])
@pytest.mark.parametrize(("n", "k"), [(30, 7), (47, 46), (20, 2)])
def test_frames_that_lost_tokens_before(n: int, k: int, temperature: float):
    film = (6, 2, 4)
    seen = slow.video(torch.randn(2, n, 8), film, slow.some(film, n))
    kept = get_strategy("vidcom2")(keep_tokens=k, temperature=temperature).decide(seen)
    assert slow.columns(kept) == [restated(seen, b, k, temperature=temperature) for b in range(2)]


@pytest.mark.parametrize("kind", slow.INPUTS)
@pytest.mark.parametrize("k", [1, 5, 39])
def test_exactly_k_and_nothing_twice(kind: str, k: int):
    slow.check_exact(get_strategy("vidcom2")(keep_tokens=k).decide(slow.video(slow.tokens(kind, 40), (5, 2, 4))), 40, k)


def test_a_frame_unlike_the_others_keeps_more():
    x = torch.randn(1, 1, 1, 8) + 0.3 * torch.randn(1, 6, 10, 8)
    x[:, 3] = -x[:, 3]
    kept = get_strategy("vidcom2")(keep_ratio=0.3).decide(slow.video(x.flatten(1, 2), (6, 2, 5)))
    counts = torch.tensor(slow.columns(kept)[0]).div(10, rounding_mode="floor").bincount(minlength=6).tolist()
    assert counts[3] > max(counts[:3] + counts[4:])
    assert sum(counts) == 18


def test_a_still_picture_keeps_what_is_least_like_its_mean():
    seen = slow.video(torch.randn(2, 12, 8), (1, 3, 4))
    kept = get_strategy("vidcom2")(keep_tokens=4, channels=1.0).decide(seen)
    for x, columns in zip(torch.nn.functional.normalize(seen.tokens, dim=-1), slow.columns(kept), strict=True):
        assert columns == slow.best((x - x.mean(0)).norm(dim=-1).tolist(), 4)
