"""Prompts with fewer visual tokens: every pattern keeps what it says, and positions are those that pruning gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vtp_plugin.tiny.missing import PATTERNS, absorb, draw, pool, renumber, some_missing, whole
from vtp_plugin.tiny.scenes import GRID

N = GRID**2


def batch(seed: int = 0, b: int = 3, d: int = 8, n: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(b, n, d, generator=generator)
    attention = torch.rand(b, n, generator=generator)
    return tokens, attention, (torch.rand(b, n, generator=generator) > 0.7).float()


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("k", "n"), [(9, N), (36, N), (130, N), (4, 64), (58, 64)])
def test_every_pattern_leaves_k_tokens_in_order(name: str, k: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtp_plugin.tiny.missing.PATTERNS", {name: PATTERNS[name]})
    for seed in range(4):
        index = draw(*batch(n=n), k, np.random.default_rng(seed))
        assert index.shape == (3, k)
        assert (index.diff(dim=1) > 0).all()
        assert 0 <= int(index.min()) <= int(index.max()) < n


OPPOSITES = {
    "most attended": "least attended",
    "largest": "smallest",
    "most similar": "least similar",
    "like neighbours": "unlike neighbours",
}


@pytest.mark.parametrize(("high", "low"), OPPOSITES.items())
def test_opposites_order_the_tokens_the_other_way_round(high: str, low: str) -> None:
    rng = np.random.default_rng(0)
    up, down = (PATTERNS[name](*batch(), rng) for name in (high, low))
    assert torch.equal(up, -down)


def test_the_patterns_go_by_what_they_are_named_after() -> None:
    tokens, attention, things = batch()
    rng = np.random.default_rng(0)
    assert torch.equal(PATTERNS["most attended"](tokens, attention, things, rng), attention)
    assert torch.allclose(PATTERNS["largest"](tokens, attention, things, rng), tokens.square().sum(-1).sqrt())
    score = PATTERNS["things"](tokens, attention, things, rng)
    assert (score[things > 0].min() > score[things == 0].max()).item()
    score = PATTERNS["background"](tokens, attention, things, rng)
    assert (score[things > 0].max() < score[things == 0].min()).item()
    one, mean = tokens[0, 5], tokens[0].mean(0)
    similar = float(PATTERNS["most similar"](tokens, attention, things, rng)[0, 5])
    assert similar == pytest.approx(float(one @ mean / one.norm() / mean.norm()), abs=1e-5)
    around = [tokens[0, place] for place in (5, 5 + GRID, 4, 6)]  # on the upper border the token itself stands above
    cosines = [float(one @ other / one.norm() / other.norm()) for other in around]
    similar = float(PATTERNS["like neighbours"](tokens, attention, things, rng)[0, 5])
    assert similar == pytest.approx(sum(cosines), abs=1e-5)


def test_farthest_points_by_the_slow_rule() -> None:
    tokens, attention, things = batch(b=1)
    order = (
        PATTERNS["diverse"](tokens, attention, things, np.random.default_rng(0))[0].argsort(descending=True).tolist()
    )
    unit = torch.nn.functional.normalize(tokens[0], dim=-1)
    for step in range(1, 20):
        nearest = {i: max(float(unit[i] @ unit[j]) for j in order[:step]) for i in set(range(N)) - set(order[:step])}
        assert nearest[order[step]] == pytest.approx(min(nearest.values()), abs=1e-6)


def test_what_is_gone_is_averaged_into_the_most_similar() -> None:
    tokens = batch(b=1)[0]
    index = torch.tensor([[3, 50, 99]])
    unit = torch.nn.functional.normalize(tokens[0], dim=-1)
    groups: dict[int, list[int]] = {place: [place] for place in index[0].tolist()}
    for other in set(range(N)) - set(groups):
        groups[max(groups, key=lambda place: float(unit[other] @ unit[place]))].append(other)
    expected = torch.stack([tokens[0, members].mean(0) for members in groups.values()])
    torch.testing.assert_close(absorb(tokens, index)[0], expected)


def test_pools_are_averages_over_rectangles() -> None:
    tokens = batch()[0]
    pooled, places = pool(tokens, 36)
    grid = tokens.unflatten(1, (GRID, GRID))
    torch.testing.assert_close(pooled[:, 0], grid[:, :2, :2].mean((1, 2)))
    torch.testing.assert_close(pooled[:, -1], grid[:, -2:, -2:].mean((1, 2)))
    assert places[0, :3].tolist() == [GRID + 1, GRID + 3, GRID + 5]
    assert (places.diff(dim=1) > 0).all()
    for k in range(1, N + 1):
        assert (pool(tokens, k)[1].diff(dim=1) > 0).all()


def test_positions_are_original_or_counted_anew() -> None:
    tokens, index = batch()[0], torch.tensor([[3, 50, 99]] * 3)
    left = tokens[:, :3]
    original, compact = renumber(left, index, N, original=True), renumber(left, index, N, original=False)
    assert original.place.tolist() == index.tolist()
    assert original.length == N
    assert compact.place.tolist() == [[0, 1, 2]] * 3
    assert compact.length == 3


def test_steps_are_whole_and_missing_of_both_numberings_and_the_same_for_a_seed() -> None:
    given = batch()
    sights = [some_missing(*given, np.random.default_rng(seed)) for seed in range(300)]
    counts = [sight.tokens.shape[1] for sight in sights]
    assert 0.5 < sum(count == N for count in counts) / 300 < 0.7
    lengths = [sight.length == N for sight, count in zip(sights, counts, strict=True) if count < N]
    assert 0.35 < sum(lengths) / len(lengths) < 0.65
    assert min(counts) <= 10
    assert max(count for count in counts if count < N) > 115
    again = some_missing(*given, np.random.default_rng(7))
    assert torch.equal(again.tokens, sights[7].tokens)
    assert torch.equal(whole(given[0]).tokens, given[0])
